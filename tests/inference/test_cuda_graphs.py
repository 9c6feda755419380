"""CUDA graphs: captured for recurring shapes, evicted by last use, in shared memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch

from mmmamba_cli.inference.cuda_graphs import (
    MAX_CACHED_SHAPES,
    MIN_CAPTURE_USES,
    WARM_UP_STEPS,
    GraphCache,
    GraphPool,
)


class Counts:
    """A task that counts its runs."""

    def __init__(self, key: int):
        self.key = key
        self.done = 0

    def __call__(self) -> None:
        self.done += 1


def test_a_recurring_shape_is_captured() -> None:
    captured: list[Counts] = []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        assert isinstance(work, Counts)
        captured.append(work)
        return lambda: None

    graphs: GraphCache[int, Counts] = GraphCache(Counts, capture)
    task, run = graphs.get(1)
    run()
    assert (task.key, task.done, captured) == (1, 1, [])
    again, run = graphs.get(1)
    run()
    assert again is task
    assert (task.done, captured) == (1, [task])
    assert graphs.get(1)[1] is run
    many, _ = graphs.get(2, MIN_CAPTURE_USES)
    assert captured == [task, many]


def test_the_least_recently_used_shape_is_evicted() -> None:
    graphs: GraphCache[int, Counts] = GraphCache(Counts, lambda work: work)
    first, _ = graphs.get(0)
    second, _ = graphs.get(1)
    for key in range(2, MAX_CACHED_SHAPES):
        graphs.get(key)
    assert graphs.get(0)[0] is first
    graphs.get(MAX_CACHED_SHAPES)
    assert graphs.get(0)[0] is first
    assert graphs.get(1)[0] is not second


def test_out_of_memory_in_a_capture_runs_the_task_eagerly() -> None:
    asked: list[Callable[[], None]] = []

    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        asked.append(work)
        raise torch.OutOfMemoryError("no room")

    graphs: GraphCache[int, Counts] = GraphCache(Counts, refuse)
    for _ in range(4):
        task, run = graphs.get(0)
        run()
    assert (task.done, len(asked)) == (4, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_freeing_a_graph_does_not_break_a_capture() -> None:
    pool = GraphPool(torch.device("cuda"))
    number = torch.zeros(1, device="cuda")
    holders: list[dict[str, object]] = [{"replay": pool.capture(partial(number.fill_, 0))}]
    # A reference cycle: only garbage collection frees it.
    holders[0]["itself"] = holders[0]
    calls = []

    def work() -> None:
        number.add_(1)
        calls.append(1)
        if len(calls) > WARM_UP_STEPS:
            holders.clear()
            # Enough allocations to trigger a collection.
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_graphs_share_pool_memory() -> None:
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
