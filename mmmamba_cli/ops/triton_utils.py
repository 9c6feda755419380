"""What every launcher of Triton kernels needs; imported only where Triton is."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs, next_power_of_2

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import MAX_GRID_ROWS

# Whether the kernels of a decoding step may begin before the launch before them has ended
# (programmatic dependent launch, from Hopper on).
OVERLAP = True
# Whether kernels may speak PTX.
NATIVE = not (knobs.runtime.interpret or torch.version.hip)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Programs along the first axis of a launch; the other two take far fewer.
MAX_GRID_PROGRAMS = 2**31 - 1


def check_inputs(op: str, *tensors: Tensor | None) -> None:
    """MmmambaError for tensors that the kernels cannot run on here."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
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
    """The grid of a launch: `programs` along the first axis, and the counts of the other two.

    What grows with the prompt, or with rows times heads, belongs on the first axis.
    MmmambaError for more programs than an axis has.
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
    """The grid of a kernel that calls `place_in_grid`, and the option for it.

    `others`, which grows with the prompt, has the second axis, and the first with `programs` where
    it has grown beyond the second. Folding always would cost 8 to 13 percent of the scan and the
    convolution on an H200.
    """
    folded = others > MAX_GRID_ROWS
    grid = (programs * others, 1, rows) if folded else (programs, others, rows)
    return launch_grid(op, *grid), {"FOLDED": folded}


def dot_type(*tensors: Tensor) -> tl.dtype:
    """What tensor cores multiply: bf16 if all tensors are, else fp32.

    fp16 is widened: a state or a sum of scores may pass its range.
    """
    halves = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    return tl.bfloat16 if halves else tl.float32


def buffer(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that a kernel fills completely; tests poison it."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def either(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read stands for a tensor that is not there."""
    return other if tensor is None else tensor.contiguous()


def block(size: int, least: int = 16) -> int:
    """The power of two that holds `size`; tl.dot wants 16 at least."""
    return max(least, next_power_of_2(size))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def overlapping(tensor: Tensor) -> dict[str, bool]:
    """Options of a launch of a kernel that calls `wait_for_inputs`."""
    if not (OVERLAP and tensor.is_cuda and _overlaps(tensor.device)):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@cache
def _overlaps(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def place_in_grid(programs, FOLDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's numbers on the first two axes of a `folded_grid` with so many on the first."""
    first, second = tl.program_id(0), tl.program_id(1)
    if FOLDED:
        first, second = first % programs, first // programs
    return first, second


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr) -> None:
    """Wait until all previous launches have ended (programmatic dependent launch).

    Before this call a kernel may read only weights and inputs marked `inputs_ready`, which were
    written before the previous launch.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def call_next(OVERLAP: tl.constexpr) -> None:
    """Lets the launch after this one begin, where there is room.

    Called only after `wait_for_inputs`: so when that one begins, everything up to the launch
    before this one has been written.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
