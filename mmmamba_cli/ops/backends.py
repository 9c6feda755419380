"""What every op needs: picking a backend, the dtype to compute in, and where sequences begin."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError

Backend = TypeVar("Backend")

# Programs along the second and third axis of a launch, where kernels have the rows of a batch.
MAX_GRID_ROWS = 65_535


def pick_backend(op: str, name: str, backends: Mapping[str, Backend]) -> Backend:
    """The backend of that name; MmmambaError naming the available ones if there is none."""
    if name not in backends:
        available = ", ".join(["auto", *backends])
        raise MmmambaError(
            f"{op}: there is no backend {name!r} on this machine", hint=f"available: {available}"
        )
    return backends[name]


def kernel_backends(
    op: str, launcher: str, *, name: str = "triton", module: str = "fused", library: str = "triton"
) -> dict[str, Callable[..., Any]]:
    """{name: launcher of `op`, in its `module`}, or {} where the kernels cannot be had.

    That is where their `library` is not installed, and in the files of an exported model, which are
    plain PyTorch: the module is found by its name, so that nothing there imports it.
    """
    return backend_of(name, library, f"{__package__}.{op}.{module}", launcher)


def backend_of(
    name: str, library: str, module: str, function: str
) -> dict[str, Callable[..., Any]]:
    """{name: that function of our module} where both the library and the module are there, else {}.

    Neither is imported before the first call.
    """
    try:
        found = importlib.util.find_spec(library) and importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        # ValueError: something put a module without a spec there.
        found = None
    if not found:
        return {}

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments, **options)

    return {name: call}


def suits_triton(*tensors: Tensor | None) -> bool:
    """Whether `auto` takes kernels for these: on a GPU that has bf16, in no dtype above fp32."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(not tensor.is_cuda or tensor.dtype == torch.float64 for tensor in given):
        return False
    return all(_has_bf16(tensor.device) for tensor in given)


def fits_grid(rows: int) -> bool:
    """Whether kernels can be launched for a batch of so many rows."""
    return rows <= MAX_GRID_ROWS


@cache
def _has_bf16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a result of these will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError unless `tensor` is None or of that shape: broadcasting would hide a mistake."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {shape}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """x in the dtype to compute in."""
    return x.to(compute_dtype(x))


def repeat_heads(tokens: Tensor, share: int) -> Tensor:
    """(B, T, K, dim) as (B, T, K * share, dim): head h is what was head h // share."""
    return tokens if share == 1 else tokens.repeat_interleave(share, dim=2)


def segment_ordinals(seq_idx: Tensor, mask: Tensor | None) -> Tensor:
    """Number the packed sequences of each row 0, 1, 2, ... in order, (B, T) int64.

    A sequence begins at a real token whose id in `seq_idx` (B, T) differs from that of the real
    token before it. Padding (`mask` 0) begins nothing, whatever its id, and counts to the sequence
    before it; the first real token of a row always belongs to sequence 0.
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
