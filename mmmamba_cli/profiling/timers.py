"""Device timers with memory and energy counters, and one timed repeat of decoding or prefill."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch.autograd import DeviceType

from mmmamba_cli.profiling.interfaces import Decoder
from mmmamba_cli.profiling.result import Memory

# Comes with NVIDIA's driver; called through ctypes to avoid a dependency for four functions.
NVML_LIBRARY = "libnvidia-ml.so.1"
NVML_SUCCESS = 0
JOULES_PER_MILLIJOULE = 1e-3

# Untimed reads of a prompt on a device that compiles or captures on first use.
PREFILL_WARM_UPS = 2
# A prefill below SHORT_PREFILL_SECONDS is repeated, because a hiccup of the host is as long. If the
# first read takes at most HICCUP_SECONDS, a second one decides whether the prefill is short.
SHORT_PREFILL_SECONDS, SHORT_PREFILL_REPEATS, HICCUP_SECONDS = 0.2, 5, 0.5

# Seconds of each repeat, and the memory held meanwhile.
TimedRepeat = tuple[tuple[float, ...], Memory]


class DeviceTimer(Protocol):
    """Clock, memory and energy counters of one device."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Time `work` on the device."""

    def now(self) -> float:
        """Seconds on a monotonic clock, for the budget."""

    def allocated(self) -> int | None:
        """Bytes held by tensors; None if the device does not count them."""

    def reset_peak(self) -> None:
        """Restart the measurement of `peak`."""

    def peak(self) -> int | None:
        """Highest number of bytes held by tensors since `reset_peak`; None if not counted."""

    def empty_cache(self) -> None:
        """Return unused memory to the device."""

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        """Sum of the kernel times of `work`; None on a CPU."""

    def joules(self) -> float | None:
        """Energy the device has used since an arbitrary moment; None if it cannot be read."""


class CPUTimer:
    """`perf_counter`. The peak memory of a CPU is that of the whole process and is not read."""

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

    def empty_cache(self) -> None:
        gc.collect()

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        return None

    def joules(self) -> float | None:
        return None


class CUDATimer:
    """CUDA events around the work, so that launch overhead counts where the device waits for it."""

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

    def empty_cache(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def kernel_seconds(self, work: Callable[[], object]) -> float | None:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize(self.device)
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            work()
            torch.cuda.synchronize(self.device)
        on_device = [e for e in trace.events() or () if e.device_type == DeviceType.CUDA]
        # Without CUPTI the profiler records no events and raises nothing.
        return sum(e.time_range.elapsed_us() for e in on_device) / 1e6 if on_device else None

    def joules(self) -> float | None:
        return None if self._joules is None else self._joules()


def device_timer(device: torch.device) -> DeviceTimer:
    return CUDATimer(device) if device.type == "cuda" else CPUTimer()


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function that returns the joules used since the driver was loaded.

    NVML API Reference, nvmlDeviceGetTotalEnergyConsumption (Volta or later). None if the library,
    the GPU or the machine does not offer the counter.
    """
    if device.type != "cuda":
        return None
    try:
        library = ctypes.CDLL(NVML_LIBRARY)
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = ctypes.c_void_p()
        started = library.nvmlInit_v2()
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
    except (OSError, AttributeError):
        return None
    if started != NVML_SUCCESS or found != NVML_SUCCESS:
        return None

    def joules() -> float:
        total = ctypes.c_ulonglong()
        code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
        if code != NVML_SUCCESS:
            raise OSError(f"NVML gave {code} for the energy counter")
        return total.value * JOULES_PER_MILLIJOULE

    try:
        joules()
    except (OSError, AttributeError):
        return None
    return joules


def device_name(device: torch.device) -> str:
    """The vendor's name of the GPU or CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def time_decode(
    decoder: Decoder,
    timer: DeviceTimer,
    *,
    batch: int,
    context: int,
    warm_up: int,
    repeats: int,
    burst: int,
    rng: torch.Generator,
    apart: bool = False,
) -> TimedRepeat:
    """Time `repeats` bursts of greedy decoding after `context` tokens; seconds are per token.

    `apart`: no other model is in memory, so the peak is all that the allocator held. The cache is
    released afterwards. Out-of-memory errors are not translated.
    """
    before = timer.allocated()
    timer.reset_peak()
    decoder.start(batch, context + warm_up + repeats * burst)
    # The memory pool of a CUDA graph is allocated here and not counted during replays.
    captured = timer.peak()
    decoder.fill_random(batch, context, rng)
    timer.reset_peak()
    if warm_up:
        decoder.decode(warm_up)
    seconds = tuple(timer.seconds(lambda: decoder.decode(burst)) / burst for _ in range(repeats))
    return seconds, _release_and_measure(decoder, timer, before, captured, apart)


def time_prefill(
    decoder: Decoder,
    timer: DeviceTimer,
    *,
    batch: int,
    context: int,
    chunk: int | None,
    warm: bool,
    rng: torch.Generator,
) -> TimedRepeat:
    """Time the prefill of `context` tokens up to the last logits; a short prefill is repeated.

    `warm` adds untimed reads that compile kernels and capture graphs. The cache is released
    afterwards. Out-of-memory errors are not translated.
    """
    ids = decoder.random_prompt(batch, context, rng)
    before = timer.allocated()
    timer.reset_peak()
    for _ in range(PREFILL_WARM_UPS if warm else 0):
        decoder.start(batch, context)
        decoder.prefill(ids, chunk)
    seconds: list[float] = []
    while len(seconds) < SHORT_PREFILL_REPEATS and (
        not seconds
        or min(seconds) <= SHORT_PREFILL_SECONDS
        or (len(seconds) == 1 and seconds[0] <= HICCUP_SECONDS)
    ):
        decoder.start(batch, context)
        seconds.append(timer.seconds(lambda: decoder.prefill(ids, chunk)))
    return tuple(seconds), _release_and_measure(decoder, timer, before)


def _release_and_measure(
    decoder: Decoder,
    timer: DeviceTimer,
    before: int | None,
    captured: int | None = None,
    apart: bool = False,
) -> Memory:
    """The memory held since `before`, as described by `Memory`; releases the decoder's cache."""
    peak = timer.peak()
    weights, cache = decoder.weight_bytes, decoder.cache_bytes
    decoder.release()
    if peak is None or before is None:
        return Memory(weights=weights, cache=cache)
    highest = max(peak, captured or 0)
    total = highest if apart else weights + highest - before
    return Memory(weights=weights, cache=cache, peak=total, apart=apart)
