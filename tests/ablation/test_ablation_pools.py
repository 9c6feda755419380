"""Processes of side-by-side cells, spread over the GPUs of a machine."""

from __future__ import annotations

import os
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from mmmamba_cli.ablation import pools
from mmmamba_cli.ablation.execution import Setting
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
