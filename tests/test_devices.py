"""Devices by name and their errors; out-of-memory errors and checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmmamba_cli
from mmmamba_cli.devices import (
    OutOfMemory,
    check_device,
    pick_device,
    require_memory,
    translate_out_of_memory,
)
from mmmamba_cli.distributed import join_world
from mmmamba_cli.errors import MmmambaError

LINEAR = Path(__file__).parents[1] / "evals" / "scenes" / "models" / "linear"


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


@pytest.mark.parametrize(
    ("device", "count", "said"),
    [
        ("cuda", 0, "device cuda is not there: "),
        ("cuda:0", 0, "device cuda:0 is not there: "),
        ("cuda:1", 1, "device cuda:1 is not there: torch finds 1 GPU, counted from 0"),
        ("cuda:7", 2, "device cuda:7 is not there: torch finds 2 GPUs, counted from 0"),
        ("gpu", 1, "device 'gpu' is not known"),
        ("CUDA", 1, "device 'CUDA' is not known"),
        ("cuda:x", 1, "device 'cuda:x' is not known"),
        ("", 1, "device '' is not known"),
    ],
)
def test_unavailable_devices_raise_an_error(
    device: str, count: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, count)
    for ask in (pick_device, check_device, lambda name: mmmamba_cli.load(LINEAR, device=name)):
        with pytest.raises(MmmambaError) as caught:
            ask(device)
        assert caught.value.message.startswith(said)
        assert caught.value.hint
    with pytest.raises(MmmambaError) as caught, join_world(device):
        pass
    assert caught.value.message.startswith(said)


def test_commands_run_on_cpu_and_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MmmambaError, match="device 'meta' cannot be used"):
        pick_device("meta")
    with pytest.raises(MmmambaError, match="device 'mps' cannot be used"), join_world("mps"):
        pass
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(MmmambaError, match="device mps is not there"):
        check_device("mps")


def test_available_devices_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == check_device(torch.device("cpu")) == torch.device("cpu")
    gpus(monkeypatch, 2)
    assert pick_device(None) == torch.device("cuda")
    assert check_device("cuda:1") == torch.device("cuda:1")
    gpus(monkeypatch, 0)
    assert pick_device(None) == torch.device("cpu")
    assert next(mmmamba_cli.load(LINEAR, device="cpu").parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_every_out_of_memory_error_is_translated(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(OutOfMemory) as caught:
        translate_out_of_memory(work)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_cpu_memory_is_checked_before_allocation() -> None:
    with pytest.raises(OutOfMemory, match=r"a cache of 9 columns needs 1048576\.0 GiB"):
        require_memory(torch.device("cpu"), 2**50, "a cache of 9 columns")
    require_memory(torch.device("cpu"), 2**10, "little")


def test_convolutions_of_commands_on_cuda_do_not_use_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    gpus(monkeypatch, 1)
    pick_device("cpu")
    assert torch.backends.cudnn.allow_tf32
    pick_device("cuda")
    assert not torch.backends.cudnn.allow_tf32
