"""Clocks and gauges of a device, and the device's own description.

A GPU's energy counter, from the library that comes with NVIDIA's driver.

Called through ctypes: three functions are no reason for a package more (NVML API Reference,
nvmlDeviceGetTotalEnergyConsumption, from Volta on).
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch.autograd import DeviceType

from mmmamba_cli.profiling.interfaces import OutOfMemory

LIBRARY = "libnvidia-ml.so.1"
SUCCESS = 0
MILLI = 1e-3


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that tells the joules the device has taken since its driver was loaded.

    None where that cannot be read: no such library, an older GPU, a machine that hides it.
    """
    if device.type != "cuda":
        return None
    try:
        library = ctypes.CDLL(LIBRARY)
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = ctypes.c_void_p()
        started = library.nvmlInit_v2()
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
    except (OSError, AttributeError):
        return None
    if started != SUCCESS or found != SUCCESS:
        return None

    def joules() -> float:
        total = ctypes.c_ulonglong()
        code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
        if code != SUCCESS:
            raise OSError(f"NVML gave {code} for the energy counter")
        return total.value * MILLI

    try:
        joules()
    except (OSError, AttributeError):
        return None
    return joules


Result = TypeVar("Result")

# Share of what a CPU's memory has left that a cache or prompt may take.
SHARE = 0.9
# How torch's CPU allocator says that it got nothing; it has no exception of its own for it.
CPU_REFUSAL = "DefaultCPUAllocator"


class Instruments(Protocol):
    """What measuring reads; a stand-in of a test says what it likes."""

    def seconds(self, work: Callable[[], object]) -> float:
        """How long the device took for `work`."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward, for the budget."""

    def allocated(self) -> int | None:
        """Bytes of the device that tensors hold; None where that cannot be read."""

    def reset_peak(self) -> None:
        """Begin to watch `peak` anew."""

    def peak(self) -> int | None:
        """The most bytes that tensors held since `reset_peak`; None where it cannot be read."""

    def clean(self) -> None:
        """Give memory that nothing holds back to the device."""

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        """How long the device itself was at work in `work`; None where it is the host."""

    def joules(self) -> float | None:
        """What the device has taken since some moment; None where that cannot be read."""


class CPUInstruments:
    """`perf_counter`; a CPU's peak memory is that of the whole process, so it is not read."""

    def seconds(self, work: Callable[[], object]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def now(self) -> float:
        return time.monotonic()

    def allocated(self) -> int | None:
        return None

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int | None:
        return None

    def clean(self) -> None:
        gc.collect()

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        return None

    def joules(self) -> float | None:
        return None


class CUDAInstruments:
    """CUDA events around the work, so that launches by the host count where the device waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self._joules = energy_counter(device)

    def seconds(self, work: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record(torch.cuda.current_stream(self.device))
        work()
        end.record(torch.cuda.current_stream(self.device))
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.monotonic()

    def allocated(self) -> int | None:
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize(self.device)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            work()
            torch.cuda.synchronize(self.device)
        on_device = [e for e in found.events() or () if e.device_type == DeviceType.CUDA]
        # Without CUPTI, the profiler sees nothing and says nothing.
        return sum(e.time_range.elapsed_us() for e in on_device) / 1e6 if on_device else None

    def joules(self) -> float | None:
        return None if self._joules is None else self._joules()


def instruments_of(device: torch.device) -> Instruments:
    return CUDAInstruments(device) if device.type == "cuda" else CPUInstruments()


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def or_out_of_memory(work: Callable[[], Result]) -> Result:
    """What `work` returns; whichever way memory was refused, as `OutOfMemory`."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        refused = str(error).partition("\n")[0] or "out of memory"
    except RuntimeError as error:
        if CPU_REFUSAL not in str(error):
            raise
        refused = str(error).partition("\n")[0]
    # Only here are the frames gone that kept the tensors alive.
    gc.collect()
    raise OutOfMemory(refused)


def require(device: torch.device, wanted: int, what: str) -> None:
    """Raise `OutOfMemory` if a CPU has not so many bytes left, or a GPU has not so many at all.

    A CPU's allocator promises more than there is, and the system ends the process when it is used.
    What a GPU has left is asked of its allocator itself.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if wanted > total:
            raise OutOfMemory(
                f"{what} needs {wanted / 2**30:.1f} GiB, the device has {total / 2**30:.1f} GiB",
                hopeless=True,
            )
    if device.type != "cpu":
        return
    left = available_bytes()
    if left is not None and wanted > SHARE * left:
        raise OutOfMemory(
            f"{what} needs {wanted / 2**30:.1f} GiB, of {left / 2**30:.1f} GiB left of this "
            f"machine's memory at most {SHARE:.0%} are used"
        )


def available_bytes() -> int | None:
    """What this process may still take, by the machine and by its control group; None if unknown"""
    found = [value for value in (_machine_left(), _group_left()) if value is not None]
    return min(found, default=None)


def _machine_left() -> int | None:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    for line in info.read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_left() -> int | None:
    """What the control group of a container leaves, by either of the two layouts."""
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
