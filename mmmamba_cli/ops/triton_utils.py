"""Helpers of the Triton kernels and their launchers; import it only if Triton is installed."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import MAX_GRID_ROWS

# Programmatic dependent launch (PDL) for the kernels of a decoding step: a kernel may start before
# the previous one has ended. Needs compute capability 9.0 (Hopper).
ENABLE_PDL = True
# Whether kernels may use inline PTX: not in the interpreter and not on AMD GPUs.
USE_PTX = not (knobs.runtime.interpret or torch.version.hip)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# CUDA's limit for the first axis of a grid; that of the other two is MAX_GRID_ROWS.
MAX_GRID_PROGRAMS = 2**31 - 1


def check_inputs(op: str, *tensors: Tensor | None) -> None:
    """Raise MmmambaError if a tensor has a dtype or device that the kernels do not support."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_floating_point() and tensor.dtype not in TRITON_DTYPES:
            raise MmmambaError(
                f"{op}: the triton backend takes bf16, fp16 and fp32, not {tensor.dtype}",
                hint="leave the backend on auto",
            )
        if not (tensor.is_cuda or knobs.runtime.interpret):
            raise MmmambaError(
                f"{op}: the triton backend runs on a GPU, the tensors are on {tensor.device}",
                hint="leave the backend on auto",
            )


def launch_grid(op: str, programs: int, *others: int) -> tuple[int, ...]:
    """The grid (programs, *others) of a launch; raises MmmambaError if it exceeds CUDA's limits.

    Counts that grow with the prompt length, or with rows times heads, belong on the first axis.
    """
    if programs > MAX_GRID_PROGRAMS or any(count > MAX_GRID_ROWS for count in others):
        counts = " x ".join(f"{count:,}" for count in (programs, *others))
        raise MmmambaError(
            f"{op}: {counts} programs exceed the launch grid, which takes {MAX_GRID_PROGRAMS:,} "
            f"on its first axis and {MAX_GRID_ROWS:,} on the others",
            hint="split the batch, or leave the backend on auto",
        )
    return (programs, *others)


def folded_grid(
    op: str, programs: int, others: int, rows: int
) -> tuple[tuple[int, ...], dict[str, bool]]:
    """The grid of a kernel that calls `grid_position`, and the kernel's FOLDED argument.

    `others` grows with the prompt length. It is the second axis, and is folded into the first if
    it exceeds the limit of the second. Always folding would slow the scan and the convolution by 8
    to 13 percent on an H200.
    """
    folded = others > MAX_GRID_ROWS
    grid = (programs * others, 1, rows) if folded else (programs, others, rows)
    return launch_grid(op, *grid), {"FOLDED": folded}


def dot_type(*tensors: Tensor) -> tl.dtype:
    """The input dtype of `tl.dot`: bf16 if all tensors are bf16, else fp32.

    fp16 is upcast, because states and sums of scores may exceed its range.
    """
    all_bf16 = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return tl.bfloat16 if all_bf16 else tl.float32


def buffer(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialized tensor on the device of `like`; the kernel must write every element."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def or_dummy(tensor: Tensor | None, dummy: Tensor) -> Tensor:
    """The tensor, contiguous, or if it is None a dummy pointer that the kernel does not read."""
    return dummy if tensor is None else tensor.contiguous()


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient of two positive integers, rounded up.

    Triton's functions `cdiv` and `next_power_of_2` also take arguments of its compiler and are many
    times slower. Launchers call them dozens of times per layer.
    """
    return -(-numerator // denominator)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, which is positive."""
    return 1 << (size - 1).bit_length()


def block_size(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and `least`; `tl.dot` needs 16."""
    return max(least, next_power_of_2(size))


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def pdl_options(tensor: Tensor) -> dict[str, bool]:
    """Launch options of a kernel that calls `wait_for_inputs`: PDL if the device supports it."""
    if not (ENABLE_PDL and tensor.is_cuda and _supports_pdl(tensor.device)):
        return {"USE_PDL": False}
    return {"USE_PDL": True, "launch_pdl": True}


@cache
def _supports_pdl(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def grid_position(programs, FOLDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program ids on the first two axes of a `folded_grid` with `programs` on the first."""
    first, second = tl.program_id(0), tl.program_id(1)
    if FOLDED:
        first, second = first % programs, first // programs
    return first, second


@triton.jit
def wait_for_inputs(USE_PDL: tl.constexpr) -> None:
    """Wait until all previous launches have ended (programmatic dependent launch).

    Before this call a kernel may read only weights and inputs marked `inputs_ready`, which were
    written before the previous launch.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(USE_PDL: tl.constexpr) -> None:
    """Allow the next launch to start on free SMs.

    Call it only after `wait_for_inputs`. The next kernel then starts after the writes of all
    launches before this one.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
