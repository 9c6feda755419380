"""Processes of side-by-side cells, spread over the GPUs of a machine."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmmamba_cli.ablation import pools
from mmmamba_cli.ablation.cell_executor import Setting
from mmmamba_cli.ablation.plan import load_plan
from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.errors import DeviceMemoryError, MmmambaError

SMOKE = Path(__file__).parents[2] / "benchmarks/plans/smoke.yaml"


def test_processes_are_spread_over_all_gpus() -> None:
    used: list[str | None] = []
    for _ in range(5):
        used.append(pools.least_used(["2", "5"], used))
    assert used == ["2", "5", "2", "5", "2"]
    used.remove("5")
    assert pools.least_used(["2", "5"], used) == "5"
    assert pools.least_used([], used) is None


@pytest.mark.parametrize(
    ("device", "named", "expected"),
    [
        (None, None, ["0", "1", "2"]),
        ("cuda", "4,6,7", ["4", "6", "7"]),
        ("cuda:1", "4,6,7", ["6"]),
        ("cpu", "4,6,7", []),
    ],
)
def test_visible_gpus(
    device: str | None, named: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv(pools.VISIBLE_DEVICES, raising=False)
    if named is not None:
        monkeypatch.setenv(pools.VISIBLE_DEVICES, named)
    assert pools.visible_gpus(device) == expected


def test_a_process_sees_its_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pools.VISIBLE_DEVICES, "4,6")
    devices = []
    monkeypatch.setattr(pools, "CellExecutor", lambda setting: devices.append(setting.device))
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    theirs.close()
    setting = Setting(load_plan(SMOKE), tmp_path, tmp_path, "cuda:1", (), 2)
    pools._work(setting, ours, context.Event(), "6")
    assert os.environ[pools.VISIBLE_DEVICES] == "6"
    assert devices == ["cuda"]


def test_units_share_a_gpu_as_little_as_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit starts on the GPU with the fewest, and its end says how many ran beside it."""
    sent: list[tuple[str, Any]] = []

    class Worker:
        def __init__(self, setting: Setting, stop: Any, gpu: str):
            self.gpu, self.connection = gpu, f"{gpu}-{len(sent)}"
            self.unit, self.beside = None, 0

    monkeypatch.setattr(pools, "_Worker", Worker)
    monkeypatch.setattr(pools, "_send", lambda connection, what: sent.append((connection, what)))
    monkeypatch.setattr(pools, "visible_gpus", lambda device: ["2", "5"])
    setting = Setting(load_plan(SMOKE), tmp_path, tmp_path, None, (), 4)
    pool = pools.ProcessPool(setting, print, lambda *_: None, lambda: False)
    assert pool.devices == 2
    units: list[Any] = [SimpleNamespace(name=name) for name in "abcdef"]
    for unit in units[:4]:
        pool.start(unit, None, None, 2)
    workers: dict[str, Any] = {worker.unit.name: worker for worker in pool._workers}
    gpus = {name: worker.gpu for name, worker in workers.items()}
    assert gpus == {"a": "2", "b": "5", "c": "2", "d": "5"}
    assert [what for _, what in sent] == [(unit, None, None, 1 / 2) for unit in units[:4]]
    assert {worker.beside for worker in workers.values()} == {1}
    # The units of GPU 5 end, and one of GPU 2: the next one has GPU 5 alone.
    workers["b"].unit = workers["c"].unit = workers["d"].unit = None
    pool.start(units[4], None, None, 1)
    alone = next(one for one in pool._workers if one.unit is units[4])
    assert (alone.gpu, alone.beside) == ("5", 0)
    alone.connection = SimpleNamespace(recv=lambda: ("end", "out of memory", "none left"))  # type: ignore[assignment]
    assert pool._receive(alone) == pools.UnitEnd(units[4], "out of memory", "none left", 0)
    assert workers["a"].beside == 1
    assert len(pool._workers) == 4


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DeviceMemoryError("stage s ran out of device memory"), "out of memory"),
        (OutOfMemory("the prompt does not fit"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (MmmambaError("another mistake"), "failed"),
    ],
)
def test_out_of_memory_is_told_apart_from_failures(error: Exception, status: str) -> None:
    def run_cell(*given: Any) -> None:
        raise error

    unit: Any = SimpleNamespace(name="cell")
    executor: Any = SimpleNamespace(run_cell=run_cell)
    control: Any = None
    assert pools.run_unit(executor, unit, None, control) == pools.UnitEnd(unit, status, str(error))


@pytest.mark.parametrize(("is_stopping", "status"), [(True, "stopped"), (False, "failed")])
def test_a_request_to_stop_that_ends_a_process_is_no_failure(
    is_stopping: bool, status: str, tmp_path: Path
) -> None:
    setting = Setting(load_plan(SMOKE), tmp_path, tmp_path, "cpu", (), 2)
    pool = pools.ProcessPool(setting, print, lambda *_: None, lambda: is_stopping)
    ours, theirs = get_context("spawn").Pipe()
    theirs.close()
    process = SimpleNamespace(join=lambda: None, exitcode=-signal.SIGTERM)
    worker: Any = SimpleNamespace(unit=object(), connection=ours, process=process)
    pool._workers.append(worker)
    end = pool._receive(worker)
    assert end is not None and end.status == status
    assert pool.running == []


def test_a_process_does_not_end_by_a_request_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler is a function, so that processes that it starts keep the default."""
    monkeypatch.setattr(pools, "CellExecutor", lambda setting: None)
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    ours, theirs = get_context("spawn").Pipe()
    theirs.close()
    setting = Setting(load_plan(SMOKE), tmp_path, tmp_path, "cpu", (), 2)
    pools._work(setting, ours, get_context("spawn").Event(), None)
    assert callable(handlers[signal.SIGTERM])
    assert handlers[signal.SIGTERM](signal.SIGTERM, None) is None
