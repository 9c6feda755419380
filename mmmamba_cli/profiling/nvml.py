"""A GPU's energy counter, from the library that comes with NVIDIA's driver.

Called through ctypes: three functions are no reason for a package more (NVML API Reference,
nvmlDeviceGetTotalEnergyConsumption, from Volta on).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

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
