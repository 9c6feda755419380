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

from mmmamba_cli.data.holistic_collator import assign_rows, make_rows

RESULT = Path(__file__).parent / "results/row_columns.json"
BATCH_SIZE, STEPS, SEED = 64, 50, 0
# Shares of conversations without, with one and with several pictures.
SHARES = (0.2, 0.6, 0.2)
# (longest row, accumulation) of steps; the first are those of qwen3-vl-* and smolvlm-hybrid.
SHAPES = ((4096, 16), (4096, 4), (4096, 1), (2048, 8))


@dataclass(frozen=True)
class Counts:
    """Averages over steps; `largest_micro_batch` in columns, over all steps."""

    max_length: int
    accumulation: int
    batching: str
    columns_per_token: float
    pairs_per_token: float
    largest_micro_batch: int


def draw_lengths(rng: np.random.Generator, max_length: int) -> list[range]:
    """Conversations of a step: ranges, whose `len` is a number of tokens."""
    text = rng.lognormal(5, 0.9, BATCH_SIZE)
    kinds = rng.choice(3, BATCH_SIZE, p=SHARES)
    one, several = rng.integers(64, 1025, BATCH_SIZE), rng.integers(500, 3000, BATCH_SIZE)
    pictures = np.choose(kinds, (np.zeros(BATCH_SIZE, dtype=int), one, several))
    return [range(int(length)) for length in np.clip(text + pictures, 16, max_length)]


def count(max_length: int, accumulation: int, batching: str) -> Counts:
    rng = np.random.default_rng(SEED)
    tokens = columns = pairs = largest = 0
    for _ in range(STEPS):
        samples = draw_lengths(rng, max_length)
        tokens += sum(map(len, samples))
        rows = make_rows(samples, batching, max_length)
        for micro in assign_rows(rows, 0, 1, accumulation):
            longest = max((sum(map(len, row)) for row in micro), default=1)
            shown = max(len(micro), 1)
            columns += shown * longest
            pairs += shown * longest**2
            largest = max(largest, shown * longest)
    return Counts(
        max_length,
        accumulation,
        batching,
        round(columns / tokens, 3),
        round(pairs / tokens),
        largest,
    )


def main() -> None:
    found = [
        count(*shape, batching) for shape in SHAPES for batching in ("padded", "bucketed", "packed")
    ]
    record = {
        "what": "columns and pairs of columns of 50 steps of 64 conversations of random lengths",
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
            f"{one.pairs_per_token:,} | {one.largest_micro_batch:,} | {one.max_length}"
        )


if __name__ == "__main__":
    main()
