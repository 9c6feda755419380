"""`accumulation: auto`: the size of micro batches of a stage.

A micro batch has as many kernel launches with several rows as with one, so more rows give each
launch more work. On an H200, with HoVLE-2.6B's shapes and one row of 8,192 columns a micro batch, a
launch took the host about 70 us in stages 1 and 2 and its kernel 45 us (22,966 and 25,998 launches,
1.04 and 1.10 s of kernels in steps of 1.56 and 1.78 s; docs/distillation.md, Speed and memory): the
GPU waited. With four rows a kernel takes about 180 us, more than twice the time of the host, which
is a margin for slower hosts and faster GPUs. `MAX_LAYER_COLUMNS` is these four rows: activations of
one layer at a time take little memory.

In stage 3 one row kept the GPU busy for 96 percent of a step. `MAX_KL_COLUMNS` is two rows, as a
margin: all layers keep about 21 GiB of activations for each where nothing recomputes, beside 13.5
GiB of all else, so that two rows fit into 80 GiB and three would not be safe. The matrices (T, T)
of `matrix-orientation` take 25 GiB for a row of 8,192 columns, and `MAX_MATRIX_COLUMNS` is one row.

The limits are numbers and not measurements, so that the order in which gradients are summed depends
on the rows and the number of processes only, not on a machine or its load. Columns are those of the
language stack: patches that an embedding stack sees before a pixel shuffle are not counted.
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
