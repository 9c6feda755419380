"""Micro batches of at most a number of columns: `accumulation: auto`."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmamba_cli.data import ColumnLimit, StepBatches, StepLoader, open_corpus
from mmmamba_cli.data.holistic_collator import assign_rows, count_micro_batches
from mmmamba_cli.processing import HolisticVLMProcessor


def rows_of(lengths: list[int]) -> list[list[range]]:
    return [[range(length)] for length in lengths]


def assigned(lengths: list[int], limit: int, world: int = 1) -> list[list[list[int]]]:
    """Lengths of the rows of each micro batch, by process."""
    rows = rows_of(lengths)
    return [
        [
            [len(row[0]) for row in part]
            for part in assign_rows(rows, rank, world, ColumnLimit(limit))
        ]
        for rank in range(world)
    ]


def area(lengths: list[int]) -> int:
    """Columns of a micro batch, with padding."""
    return len(lengths) * max(lengths, default=0)


@pytest.mark.parametrize(
    ("lengths", "limit", "world", "expected"),
    [
        ([8, 8, 8, 8, 8, 8, 8, 8], 32, 1, [[[8] * 4, [8] * 4]]),
        ([8, 8, 8, 8, 8, 8, 8, 8], 31, 1, [[[8] * 3, [8] * 3, [8] * 2]]),
        # Fewer columns where that takes no other micro batch: 4 x 2 and 3 x 3, not 5 x 2 and 3 x 3.
        ([5, 4, 4, 3, 3, 3], 10, 1, [[[5], [4, 4], [3, 3, 3]]]),
        # 4 x 1 + 3 x 1 are one micro batch, whatever the padding.
        ([4, 3, 1], 12, 1, [[[4, 3, 1]]]),
        # Packed or padded rows are not sorted.
        ([3, 4, 1], 8, 1, [[[3, 4], [1]]]),
        # A row above the limit is alone, and does not raise it for the others.
        ([30, 3, 3, 3, 3], 9, 1, [[[30], [3, 3], [3, 3]]]),
        ([30, 3, 3, 3, 3], 12, 1, [[[30], [3, 3, 3, 3]]]),
        ([30, 20], 9, 1, [[[30], [20]]]),
        # Two parts on two processes are a micro batch each; three are two, of which one is empty.
        ([8, 8], 8, 2, [[[8]], [[8]]]),
        ([8, 8, 8], 8, 2, [[[8], [8]], [[8], []]]),
        # Processes share what one of them could hold.
        ([8, 8], 32, 2, [[[8]], [[8]]]),
        ([], 8, 2, [[[]], [[]]]),
    ],
)
def test_rows_by_hand(
    lengths: list[int], limit: int, world: int, expected: list[list[list[int]]]
) -> None:
    assert assigned(lengths, limit, world) == expected


def fewest_parts(lengths: list[int], limit: int) -> int:
    """The least number of contiguous parts within the limit, by trying all of them."""

    def fits(parts: int) -> bool:
        for places in combinations(range(1, len(lengths)), parts - 1):
            bounds = (0, *places, len(lengths))
            cut = [lengths[a:b] for a, b in pairwise(bounds)]
            if all(len(part) == 1 or area(part) <= limit for part in cut):
                return True
        return False

    return next(parts for parts in range(1, len(lengths) + 1) if fits(parts))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 90), st.integers(1, 4))
def test_as_few_as_can_be_and_alike_on_all_processes(
    lengths: list[int], limit: int, world: int
) -> None:
    found = assigned(lengths, limit, world)
    (number,) = {len(share) for share in found}
    assert number == -(-fewest_parts(lengths, limit) // world)
    assert number == count_micro_batches(rows_of(lengths), world, ColumnLimit(limit))
    in_order = [found[part % world][part // world] for part in range(number * world)]
    assert [length for part in in_order for length in part] == lengths
    assert all(len(part) <= 1 or area(part) <= limit for part in in_order)


def names(shares: list[StepBatches]) -> list[str]:
    return sorted(name for share in shares for micro in share.micro_batches for name in micro.names)


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
def test_steps_of_conversations(
    batching: str, folder: Path, processor: HolisticVLMProcessor
) -> None:
    """Conversations with pictures: the same samples and numbers for 1, 2 and 4 processes."""
    corpus, limit = open_corpus(folder / "train.jsonl", folder), 500
    numbers = []
    for step in range(2):
        for world in (1, 2, 4):
            loaders = [
                StepLoader(
                    corpus,
                    processor,
                    batch_size=11,
                    accumulation=ColumnLimit(limit),
                    max_length=500,
                    batching=batching,
                    rank=rank,
                    world_size=world,
                )
                for rank in range(world)
            ]
            shares = [loader.step(step) for loader in loaders]
            (number,) = {len(share.micro_batches) for share in shares}
            assert {loader.count_micro_batches(step) for loader in loaders} == {number}
            micros = [micro for share in shares for micro in share.micro_batches]
            assert all(len(micro.labels) == 1 or micro.labels.numel() <= limit for micro in micros)
            if world == 1:
                alone = number
                whole = names(shares)
                numbers.append(number)
            assert number == -(-alone // world)
            assert names(shares) == whole
            assert len(whole) == 11
    assert min(numbers) > 2
