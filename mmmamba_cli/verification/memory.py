"""Memory of a verification, and estimates of what the next steps need."""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import torch

from mmmamba_cli.checkpoint.tensor_source import TensorSource
from mmmamba_cli.inspection import format_bytes
from mmmamba_cli.verification.report import OK, CheckResult
from mmmamba_cli.verification.stored_tensors import largest_tensor

MEMORY = "memory"
# Of a trained parameter: fp32 value, gradient and the two moments of AdamW.
BYTES_PER_TRAINED_PARAMETER = 16
FP32_BYTES = 4


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers of a model; a tied tensor counts once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def peak_bytes(device: torch.device) -> int | None:
    """The peak of the device's allocator; on a CPU that of the whole process. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_memory(
    source: TensorSource,
    weights: int,
    device: torch.device,
    shapes: dict[str, tuple[int, ...]],
    new: dict[str, tuple[int, ...]],
) -> list[CheckResult]:
    """Weights as loaded, the peak so far, and estimates for `seed` and `distill`.

    `shapes` are those of a student with the default mixer in every layer, `new` those of its
    tensors that the teacher lacks. The estimates leave activations out.
    """
    peak = peak_bytes(device)
    where = "on the GPU" if device.type == "cuda" else "of this process, mapped files included,"
    measured = f"weights {format_bytes(weights)}"
    if peak is not None:
        measured += f"; peak {where} {format_bytes(peak)}"
    name, elements = largest_tensor(source)
    student, added = (sum(map(prod, one.values())) for one in (shapes, new))
    trained = BYTES_PER_TRAINED_PARAMETER
    estimates = (
        f"seed about {format_bytes(elements * FP32_BYTES)}, one tensor at a time (the largest is "
        f"{name}); distill, besides the teacher and without activations: "
        f"{format_bytes(added * trained)} if the {added / 1e6:,.1f} M new parameters of a linear "
        f"student learn, {format_bytes(student * trained)} if all {student / 1e6:,.1f} M do"
    )
    return [
        CheckResult(MEMORY, OK, measured),
        CheckResult("memory, estimates", OK, estimates),
    ]
