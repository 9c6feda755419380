"""Copies of tensors from the CPU to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_without_wait(values: Tensor, device: torch.device) -> Tensor:
    """Copy values of the CPU to `device`, without waiting for a GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
