"""`accumulation: auto`: the size of micro batches of a stage.

A step of one row of 8,192 columns a micro batch left a GPU waiting for its host: on an H200, with
HoVLE-2.6B's shapes and 8 rows a step, stages 1 and 2 had 22,966 and 25,998 kernel launches and 1.04
and 1.10 s of kernels in steps of 1.56 and 1.78 s, so that a launch took the host about 70 us and
its kernel 45 us. A micro batch of four rows has the same number of launches, each with about four
times the work: 180 us, more than twice the time of the host, which varies between machines.
`MAX_LAYER_COLUMNS` is these four rows. Activations of one layer at a time leave room for them.

Stage 3 kept the same GPU busy for 96 percent of the time with one row, of which all layers keep
about 21 GiB where nothing recomputes, beside 13.5 GiB of weights, gradients and moments.
`MAX_KL_COLUMNS` is two rows: as much work again for each launch, as a margin for slower hosts, and
about 56 GiB, which fits into 80. Mixing matrices (T, T) of `matrix-orientation` take 25 GiB for a
row of 8,192 columns, so that one row of this length is its limit.

The limits are numbers, not measurements, so that sums of gradients are rounded in the same order on
every machine with the same number of processes. Columns are tokens: patches of an embedding stack
behind which pixels are shuffled are not counted.
"""

from __future__ import annotations

from mmmamba_cli.data import Accumulation, ColumnLimit
from mmmamba_cli.recipe import Stage

# Columns of a micro batch: of all its rows, with padding.
MAX_LAYER_COLUMNS = 32_768
MAX_KL_COLUMNS = 16_384
MAX_MATRIX_COLUMNS = 8_192


def max_columns(stage: Stage) -> int:
    """The most columns of a micro batch of several rows in a stage with `accumulation: auto`."""
    by_loss = {"kl": MAX_KL_COLUMNS, "matrix-orientation": MAX_MATRIX_COLUMNS}
    return by_loss.get(stage.loss, MAX_LAYER_COLUMNS)


def stage_accumulation(stage: Stage) -> Accumulation:
    """Micro batches of a stage, as a `StepLoader` takes them."""
    if stage.accumulation == "auto":
        return ColumnLimit(max_columns(stage))
    return stage.accumulation


def rows_at_most(stage: Stage, length: int, processes: int) -> int:
    """Rows of the largest micro batch if every row has `length` columns and one sample."""
    share = -(-stage.batch_size // processes)
    if stage.accumulation == "auto":
        return min(share, max(1, max_columns(stage) // length))
    return -(-share // stage.accumulation)
