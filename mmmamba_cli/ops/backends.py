"""Shared by all ops: backend registries, dtypes of computation, shape checks, packed sequences."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError

Backend = TypeVar("Backend")

# CUDA's limit for the second and third axis of a grid; kernels have the batch rows there.
MAX_GRID_ROWS = 65_535


def get_backend(op: str, name: str, backends: Mapping[str, Backend]) -> Backend:
    """The backend `name`; raises MmmambaError with the available names if there is none."""
    if name not in backends:
        available = ", ".join(["auto", *backends])
        raise MmmambaError(
            f"{op}: there is no backend {name!r} on this machine", hint=f"available: {available}"
        )
    return backends[name]


def optional_backend(
    name: str, module: str, function: str, library: str = "triton"
) -> dict[str, Callable[..., Any]]:
    """{name: `function` of `module`}, or {} if the library or the module is not installed.

    Both are imported on the first call. The module is missing in the files of an exported model,
    which are plain PyTorch; it is a string so that nothing in them imports it.
    """
    try:
        found = importlib.util.find_spec(library) and importlib.util.find_spec(module)
    except (ImportError, ValueError):
        # ValueError: sys.modules has a module of that name without a spec.
        found = None
    if not found:
        return {}

    def imported(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    return {name: imported}


def supports_triton(*tensors: Tensor | None) -> bool:
    """Whether `auto` may use Triton kernels: all tensors on a GPU with bf16, none of them fp64."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(not tensor.is_cuda or tensor.dtype == torch.float64 for tensor in given):
        return False
    return all(_has_bf16(tensor.device) for tensor in given)


def fits_grid(rows: int) -> bool:
    """Whether a batch of `rows` rows fits the second and third axis of a launch grid."""
    return rows <= MAX_GRID_ROWS


@cache
def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` is None or has `shape`, which rules out broadcasting."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """x in its `compute_dtype`."""
    return x.to(compute_dtype(x))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of `x`, if that device has autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext()


# The compiler of torch 2.11 and earlier cannot trace this call.
@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def repeat_heads(tokens: Tensor, group_size: int) -> Tensor:
    """(B, T, K, dim) -> (B, T, K * group_size, dim); head h is head h // group_size of `tokens`."""
    return tokens if group_size == 1 else tokens.repeat_interleave(group_size, dim=2)


def segment_ordinals(seq_idx: Tensor, mask: Tensor | None) -> Tensor:
    """Number the packed sequences of each row 0, 1, 2, ... in order, (B, T) int64.

    A sequence starts at each real token whose id in `seq_idx` (B, T) differs from that of the
    previous real token. Padding (`mask` 0) starts no sequence, whatever its id, and belongs to the
    sequence before it; the first real token of a row belongs to sequence 0.
    """
    changed = torch.zeros_like(seq_idx, dtype=torch.bool)
    if mask is None:
        changed[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        return changed.cumsum(1)
    real = mask.bool()
    columns = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last_real = torch.where(real, columns, -1).cummax(1).values[:, :-1]
    id_before = seq_idx.gather(1, last_real.clamp(min=0))
    changed[:, 1:] = real[:, 1:] & (last_real >= 0) & (seq_idx[:, 1:] != id_before)
    return changed.cumsum(1)
