"""What FlashAttention, as PyTorch has it, can do here."""

from functools import cache

import torch
from torch import Tensor

# Beyond 192 some GPUs have no gradients.
MULTIPLE, MOST = 8, 192
DTYPES = (torch.float16, torch.bfloat16)


def suits_flash(q: Tensor) -> bool:
    """Whether the kernels run for queries (..., P): an NVIDIA GPU with bf16, half precision."""
    dim = q.shape[-1]
    if not q.is_cuda or computed_in(q) not in DTYPES or dim % MULTIPLE or dim > MOST:
        return False
    return torch.backends.cuda.flash_sdp_enabled() and _is_there(q.device)


def computed_in(q: Tensor) -> torch.dtype:
    """The dtype that autocast asks for, or the tensor's own; fp64 stays."""
    kind = q.device.type
    if q.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return q.dtype
    return torch.get_autocast_dtype(kind)


@cache
def _is_there(device: torch.device) -> bool:
    return (
        torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
