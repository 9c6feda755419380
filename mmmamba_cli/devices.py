"""Devices: selection by name, free memory, and out-of-memory errors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mmmamba_cli.errors import MmmambaError

if TYPE_CHECKING:
    import torch

# Devices that commands run on. `mmmamba_cli.load` takes any that torch has.
COMMAND_DEVICES = ("cpu", "cuda")
DEVICE_HINT = "give cpu or cuda"
# Share of the free CPU memory that one allocation may take.
MAX_CPU_MEMORY_SHARE = 0.9
# torch's CPU allocator has no exception class of its own; its message contains this word.
CPU_ALLOCATOR_MESSAGE = "DefaultCPUAllocator"

Result = TypeVar("Result")


class OutOfMemory(Exception):
    """A model, cache or prompt is too large for the device. No memory is held when it is raised.

    `hopeless`: it would not fit on an empty device either.
    """

    def __init__(self, message: str, hopeless: bool = False):
        super().__init__(message)
        self.hopeless = hopeless


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device for a command; for None, CUDA if available, else CPU.

    On CUDA it turns off TF32, PyTorch's default, for fp32 convolutions of this process.

    Raises `MmmambaError` for an unknown name or a device that is not available.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = _parse_device(name)
    if device.type not in COMMAND_DEVICES:
        raise MmmambaError(f"device {str(name)!r} cannot be used", DEVICE_HINT)
    device = check_device(device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device


def check_device(name: str | int | torch.device) -> torch.device:
    """The device of any type; `MmmambaError` if this machine does not have it."""
    import torch

    device = _parse_device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise MmmambaError(f"device {device} is not there: {_describe_gpus(count)}", "give cpu")
    elif device.type not in ("cpu", "meta"):
        known = torch.accelerator.current_accelerator(check_available=True)
        if known is None or known.type != device.type:
            raise MmmambaError(
                f"device {device} is not there: torch finds no such device", DEVICE_HINT
            )
    return device


def _parse_device(name: str | int | torch.device) -> torch.device:
    import torch

    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise MmmambaError(f"device {name!r} is not known", DEVICE_HINT) from error


def _describe_gpus(count: int) -> str:
    import torch

    if count:
        return f"torch finds {count} GPU{'s' if count > 1 else ''}, counted from 0"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA"
    return "torch finds no GPU"


def translate_out_of_memory(work: Callable[[], Result]) -> Result:
    """Return `work()`; raise `OutOfMemory` for every kind of out-of-memory error of torch."""
    import torch

    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = str(error).partition("\n")[0] or "out of memory"
    except RuntimeError as error:
        if CPU_ALLOCATOR_MESSAGE not in str(error):
            raise
        message = str(error).partition("\n")[0]
    # The traceback and its frames, which keep the tensors alive, are only gone after the handler.
    gc.collect()
    raise OutOfMemory(message)


def require_memory(device: torch.device, nbytes: int, what: str) -> None:
    """Check that `nbytes` fit into the free memory of a CPU, or the total memory of a GPU.

    A CPU allocation succeeds lazily and the kernel kills the process on first use, so it is checked
    beforehand. A GPU's allocator reports its free memory itself.

    Raises:
        OutOfMemory: if they do not fit.
    """
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if nbytes > total:
            raise OutOfMemory(
                f"{what} needs {nbytes / 2**30:.1f} GiB, the device has {total / 2**30:.1f} GiB",
                hopeless=True,
            )
    if device.type != "cpu":
        return
    free = free_cpu_memory()
    if free is not None and nbytes > MAX_CPU_MEMORY_SHARE * free:
        raise OutOfMemory(
            f"{what} needs {nbytes / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB left of this "
            f"machine's memory at most {MAX_CPU_MEMORY_SHARE:.0%} are used"
        )


def free_cpu_memory() -> int | None:
    """Bytes that this process may still allocate on this machine and in its control group."""
    known = [value for value in (_machine_free(), _cgroup_free()) if value is not None]
    return min(known, default=None)


def _machine_free() -> int | None:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    for line in info.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_free() -> int | None:
    """Bytes left in the container's control group, version 2 or 1."""
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        if limit.is_file() and used.is_file():
            text = limit.read_text(encoding="utf-8").strip()
            if text.isdigit():
                return max(0, int(text) - int(used.read_text(encoding="utf-8")))
    return None
