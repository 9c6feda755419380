"""Graphs: kept for what comes often, and not spoiled by those that are let go of."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch

from mmmamba_cli.inference.cuda_graphs import ENOUGH, MOST_WORKS, WARM_UP_STEPS, GraphPool, Works


class Counts:
    """Work that counts."""

    def __init__(self, key: int):
        self.key = key
        self.done = 0

    def __call__(self) -> None:
        self.done += 1


def test_work_is_captured_when_it_comes_often() -> None:
    captured: list[Counts] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        assert isinstance(work, Counts)
        captured.append(work)
        return lambda: None

    works: Works[int, Counts] = Works(Counts, capture)
    made, run = works.prepared(1)
    run()
    assert (made.key, made.done, captured) == (1, 1, [])
    again, run = works.prepared(1)
    run()
    assert again is made
    assert (made.done, captured) == (1, [made])
    assert works.prepared(1)[1] is run
    many, _ = works.prepared(2, ENOUGH)
    assert captured == [made, many]


def test_what_was_done_longest_ago_is_let_go_of() -> None:
    works: Works[int, Counts] = Works(Counts, lambda work: work)
    first, _ = works.prepared(0)
    second, _ = works.prepared(1)
    for key in range(2, MOST_WORKS):
        works.prepared(key)
    assert works.prepared(0)[0] is first
    works.prepared(MOST_WORKS)
    assert works.prepared(0)[0] is first
    assert works.prepared(1)[0] is not second


def test_without_memory_for_a_graph_work_runs_as_it_is() -> None:
    asked: list[Callable[[], None]] = []

    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        asked.append(work)
        raise torch.OutOfMemoryError("no room")

    works: Works[int, Counts] = Works(Counts, refuse)
    for _ in range(4):
        made, run = works.prepared(0)
        run()
    assert (made.done, len(asked)) == (4, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs want a GPU")
def test_a_graph_that_is_let_go_of_does_not_spoil_another() -> None:
    pool = GraphPool(torch.device("cuda"))
    number = torch.zeros(1, device="cuda")
    holders: list[dict[str, object]] = [{"replay": pool.capture(partial(number.fill_, 0))}]
    # Only a collection finds it.
    holders[0]["itself"] = holders[0]
    calls = []

    def work() -> None:
        number.add_(1)
        calls.append(1)
        if len(calls) > WARM_UP_STEPS:
            holders.clear()
            # Enough that a collection is due.
            calls.extend([[] for _ in range(10)])

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        replay = pool.capture(work)
    finally:
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    before = number.item()
    replay()
    assert number.item() == before + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs want a GPU")
def test_graphs_take_up_the_memory_of_others() -> None:
    pool = GraphPool(torch.device("cuda"))
    inputs = torch.ones(1 << 22, device="cuda")
    outputs = torch.zeros_like(inputs)
    kept, reserved = [], []

    def work() -> None:
        # With temporary tensors of 16 MiB.
        outputs.copy_((inputs + 1) * 2 - inputs)

    for _ in range(6):
        kept.append(pool.capture(work))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]
    outputs.zero_()
    kept[0]()
    assert bool((outputs == 3).all())
