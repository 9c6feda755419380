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
