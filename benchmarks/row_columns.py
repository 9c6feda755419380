"""Count what rows of unequal conversations cost: columns, and pairs of columns of attention.

The rows and micro batches of a step are those of the loader (`data.batching`). Every layer computes
all columns, padding included; attention computes all pairs of columns of a row, also those of two
conversations. Lengths are drawn at random: text with a log-normal length, and none, one or several
pictures. Nothing is timed:

    python benchmarks/row_columns.py
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmmamba_cli.data import Accumulation, ColumnLimit
from mmmamba_cli.data.holistic_collator import assign_rows, make_rows
from mmmamba_cli.distill.micro_batches import MAX_KL_COLUMNS, MAX_LAYER_COLUMNS

RESULT = Path(__file__).parent / "results/row_columns.json"
STEPS, SEED = 50, 0
# Shares of conversations without, with one and with several pictures.
SHARES = (0.2, 0.6, 0.2)
LAYERS, KL = ColumnLimit(MAX_LAYER_COLUMNS), ColumnLimit(MAX_KL_COLUMNS)
# (longest row, conversations, accumulation) of steps: the first of each length are those of
# qwen3-vl-*, smolvlm-hybrid, and stages 1 and 3 of mmmamba-linear.
SHAPES: tuple[tuple[int, int, Accumulation], ...] = (
    *((4096, 64, number) for number in (16, LAYERS, KL, 4, 1)),
    *((2048, 64, number) for number in (8, LAYERS, KL)),
    *((8192, *shape) for shape in ((128, LAYERS), (64, KL), (128, 1), (64, 1))),
)


@dataclass(frozen=True)
class Counts:
    """Averages over steps; `largest_micro_batch` in columns, over all steps.

    `accumulation` with its limit of columns where it is auto.
    """

    max_length: int
    batch_size: int
    accumulation: int | str
    batching: str
    micro_batches: float
    columns_per_token: float
    pairs_per_token: float
    largest_micro_batch: int


def draw_lengths(rng: np.random.Generator, max_length: int, batch_size: int) -> list[range]:
    """Conversations of a step: ranges, whose `len` is a number of tokens."""
    text = rng.lognormal(5, 0.9, batch_size)
    kinds = rng.choice(3, batch_size, p=SHARES)
    one, several = rng.integers(64, 1025, batch_size), rng.integers(500, 3000, batch_size)
    pictures = np.choose(kinds, (np.zeros(batch_size, dtype=int), one, several))
    return [range(int(length)) for length in np.clip(text + pictures, 16, max_length)]


def count(max_length: int, batch_size: int, accumulation: Accumulation, batching: str) -> Counts:
    rng = np.random.default_rng(SEED)
    tokens = columns = pairs = largest = micro_batches = 0
    for _ in range(STEPS):
        samples = draw_lengths(rng, max_length, batch_size)
        tokens += sum(map(len, samples))
        rows = make_rows(samples, batching, max_length)
        micros = assign_rows(rows, 0, 1, accumulation)
        micro_batches += len(micros)
        for micro in micros:
            longest = max((sum(map(len, row)) for row in micro), default=1)
            shown = max(len(micro), 1)
            columns += shown * longest
            pairs += shown * longest**2
            largest = max(largest, shown * longest)
    return Counts(
        max_length,
        batch_size,
        accumulation if isinstance(accumulation, int) else f"auto ({accumulation.columns:,})",
        batching,
        micro_batches / STEPS,
        round(columns / tokens, 3),
        round(pairs / tokens),
        largest,
    )


def main() -> None:
    found = [
        count(*shape, batching) for shape in SHAPES for batching in ("padded", "bucketed", "packed")
    ]
    record = {
        "what": "columns and pairs of columns of 50 steps of conversations of random lengths",
        "command": "python benchmarks/row_columns.py",
        "date": "2026-11-30",
        "device": "counted, not timed",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "seed": SEED,
        "counts": [asdict(one) for one in found],
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for one in found:
        print(
            f"| {one.accumulation} | {one.batching} | {one.columns_per_token:.2f} | "
            f"{one.pairs_per_token:,} | {one.largest_micro_batch:,} | {one.micro_batches} | "
            f"{one.max_length} | {one.batch_size}"
        )


if __name__ == "__main__":
    main()
