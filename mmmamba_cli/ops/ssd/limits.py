"""What each fused scan can take: `auto` asks it before it chooses, an adapter before it calls."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.common import MAX_GRID_ROWS, fits_grid, suits_triton, wants_gradients


class Limits(NamedTuple):
    """Dtypes of x, B and C; whether gradients and packed rows can be had; sizes of P and N.

    A dtype is left out where matrix products would have fewer digits than it has.
    """

    dtypes: tuple[torch.dtype, ...]
    gradients: bool = True
    packing: bool = True
    # A head's state has to fit into the registers of one program.
    most_dims: int = 256
    multiple: int = 1


# The fastest first: `benchmarks/kernels.py` times triton and mamba_ssm. fla was not timed; it comes
# last because it takes the least. In both libraries fp32 products are TF32, and states between
# chunks have the dtype of x, B and C. fla's backward is wrong on Hopper with Triton 3.4 to 3.7.0,
# where it refuses.
LIMITS = {
    "triton": Limits((torch.bfloat16, torch.float16, torch.float32)),
    "mamba_ssm": Limits((torch.bfloat16,)),
    "fla": Limits((torch.bfloat16,), gradients=False, packing=False, multiple=16),
}


class Scan(NamedTuple):
    """What a choice depends on: arguments of `ops.ssd`, checked."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    D: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None

    @property
    def trains(self) -> bool:
        return wants_gradients(*self[:-1])


def refusal(backend: str, asked: Scan) -> str | None:
    """Why that backend cannot run this, as the end of a sentence; None if it can."""
    limits = LIMITS[backend]
    if not suits_triton(*asked[:-1]):
        return "wants tensors on a GPU that has bf16, none of them in fp64"
    if any(tensor.dtype not in limits.dtypes for tensor in (asked.x, asked.B, asked.C)):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
        return f"multiplies x, B and C in {names} only"
    dims = (asked.x.shape[-1], asked.B.shape[-1])
    if max(dims) > limits.most_dims or any(dim % limits.multiple for dim in dims):
        return (
            f"takes value and state dims of at most {limits.most_dims} that are multiples of "
            f"{limits.multiple}, not {dims[0]} and {dims[1]}"
        )
    if not fits_grid(len(asked.x)):
        return f"takes at most {MAX_GRID_ROWS:,} rows, not {len(asked.x):,}"
    if asked.trains and not limits.gradients:
        return "has no gradient that can be relied on; run it under torch.no_grad()"
    if asked.seq_idx is not None and not limits.packing:
        return "takes no packed rows (seq_idx)"
    return None


def refuse(backend: str, asked: Scan) -> None:
    """MmmambaError with the reason if that backend cannot run this."""
    reason = refusal(backend, asked)
    if reason is not None:
        raise MmmambaError(f"ssd: the {backend} backend {reason}", hint="leave the backend on auto")
