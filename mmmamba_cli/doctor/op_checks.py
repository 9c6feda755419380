"""Every backend of every op against the op's reference in fp64 on the CPU, forward and backward.

Which scan a model gets on this machine: backends that are there, and the one `auto` takes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.doctor.op_cases import Case, Op, Tensors, all_ops
from mmmamba_cli.doctor.report import FAILED, OK, SKIPPED, WARNING, Check, OpCheck
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.ssd import SCAN_BACKENDS
from mmmamba_cli.ops.ssd.dispatch import select_backend
from mmmamba_cli.ops.ssd.reference import ScanInputs

# Relative errors that rounding explains, with room for another order of summation.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
# What a backend says of an argument it does not take; the others decide then.
REFUSALS = (NotImplementedError, MmmambaError)


@dataclass(frozen=True)
class Errors:
    """Largest relative errors of one case; `backward` None if the backend has no gradients."""

    forward: float
    backward: float | None


def check_ops(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    ops: list[Op] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[OpCheck]:
    """Check whatever backends are registered now, also those that we have never heard of.

    `say` is told of those that may keep one waiting.
    """
    threads = torch.get_num_threads()
    # Threads wait for each other longer than these small problems take, where others compute too.
    torch.set_num_threads(1)
    try:
        yield from _check_all(all_ops() if ops is None else ops, device, dtypes, say)
    finally:
        torch.set_num_threads(threads)


def _check_all(
    ops: list[Op],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    say: Callable[[str], object],
) -> Iterator[OpCheck]:
    for op in ops:
        if not op.cases:
            yield OpCheck(op.name, "all", "-", FAILED, None, None, 0, 0, "the doctor has no case")
            continue
        for backend in op.backends:
            if backend in op.optional and device.type == "cuda":
                say(f"checking {op.name} by {backend}, which may tune itself for minutes, once")
            for dtype in dtypes:
                yield check_backend(op, backend, device, dtype)


def check_backend(op: Op, backend: str, device: torch.device, dtype: torch.dtype) -> OpCheck:
    """All cases of an op by one backend."""
    tolerance = TOLERANCES[dtype]
    name = str(dtype).removeprefix("torch.")
    found: list[Errors] = []
    refused = ""
    wrong = WARNING if backend in op.optional else FAILED
    for case in op.cases:
        try:
            found.append(errors_of(op, case, backend, device, dtype))
        except REFUSALS as error:
            refused = f"refuses {case.name}: {error}"
        except Exception as error:  # noqa: BLE001  a broken kernel may raise anything
            first = (str(error).strip().splitlines() or [""])[0]
            said = f"{case.name}: {type(error).__name__}: {first}"
            return OpCheck(op.name, backend, name, wrong, None, None, tolerance, len(found), said)
    if not found:
        return OpCheck(op.name, backend, name, SKIPPED, None, None, tolerance, 0, refused)
    forward = _worst(errors.forward for errors in found)
    gradients = [errors.backward for errors in found if errors.backward is not None]
    backward = _worst(gradients) if gradients else None
    right = all(error <= tolerance for error in (forward, backward) if error is not None)
    said = ""
    if backward is None and op.trains and backend not in op.forward_only:
        right, said = False, "has no gradients, but is used in training"
    return OpCheck(
        op.name,
        backend,
        name,
        OK if right else wrong,
        forward,
        backward,
        tolerance,
        len(found),
        said,
    )


def errors_of(op: Op, case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> Errors:
    """One case by one backend; inputs are rounded to `dtype` for both sides."""
    rounded = {
        name: value.to(torch.float32 if name in case.small else dtype)
        for name, value in case.values.items()
    }
    exact = {name: value.double() for name, value in rounded.items()}
    trains = backend not in op.forward_only
    wanted, wanted_gradients = _run(case, exact, case.fixed, op.reference, trains)
    here = {name: value.to(device) for name, value in rounded.items()}
    fixed = {name: value.to(device) for name, value in case.fixed.items()}
    found, gradients = _run(case, here, fixed, backend, trains)
    forward = _worst(map(relative_error, found, wanted))
    if gradients is None or wanted_gradients is None:
        return Errors(forward, None)
    return Errors(forward, _worst(map(relative_error, gradients, wanted_gradients)))


def _run(
    case: Case, values: Tensors, fixed: Tensors, backend: str, trains: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Outputs and, where it trains, the gradients of a weighted sum of them by all values."""
    leaves = {name: value.clone().requires_grad_(trains) for name, value in values.items()}
    outputs = case.call(leaves, fixed, backend)
    if not all(output.requires_grad for output in outputs):
        return tuple(output.detach() for output in outputs), None
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [_cotangent(output) for output in outputs]
    )
    return tuple(output.detach() for output in outputs), gradients


def _cotangent(output: Tensor) -> Tensor:
    """Weights of an output's elements: few bits each, so that no dtype rounds them."""
    weights = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (weights + 0.5).to(output.dtype).view(output.shape)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|a - b| / |b| by 2-norms in fp64; |a| where b is 0."""
    wanted = wanted.double()
    distance = float((found.double().cpu() - wanted).norm())
    return distance / (float(wanted.norm()) or 1.0)


def _worst(errors: Iterable[float]) -> float:
    """The largest, and NaN if one is: it is larger than any."""
    known = list(errors)
    return math.nan if any(map(math.isnan, known)) else max(known)


DTYPES = (torch.bfloat16, torch.float32)
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 1, 8, 4, 2, 64


def check_choice(device: torch.device) -> Check:
    """The scan that `auto` takes on `device`, for each dtype, in inference and in training.

    A warning with what was seen if it passes over one that is installed because it is wrong here.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taken = {
            (dtype, trains): _taken(device, dtype, trains)
            for dtype in DTYPES
            for trains in (False, True)
        }
    there = f"there are {', '.join(SCAN_BACKENDS)}; auto takes {_in_words(taken)}"
    seen = dict.fromkeys(str(each.message) for each in caught if each.category is RuntimeWarning)
    if seen:
        return Check("scan", WARNING, f"{there}. " + "; ".join(seen))
    return Check("scan", OK, there)


def _taken(device: torch.device, dtype: torch.dtype, trains: bool) -> str:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, requires_grad=trains)

    tokens = (BATCH, LENGTH)
    inputs = ScanInputs(
        x=zeros(*tokens, KV_HEADS, DIM, dtype=dtype),
        dt=zeros(*tokens, HEADS, dtype=dtype),
        A=zeros(HEADS),
        B=zeros(*tokens, KV_HEADS, DIM, dtype=dtype),
        C=zeros(*tokens, HEADS, DIM, dtype=dtype),
        dt_bias=None,
        dt_softplus=True,
        D=None,
        initial_state=None,
        mask=None,
        seq_idx=None,
        chunk_size=64,
    )
    return select_backend(SCAN_BACKENDS, inputs)


def _in_words(taken: dict[tuple[torch.dtype, bool], str]) -> str:
    """`triton`, or `triton (bfloat16), chunked (float32; float32 in training)`."""
    if len(set(taken.values())) == 1:
        return next(iter(taken.values()))
    cases: dict[str, list[str]] = {}
    for (dtype, trains), name in taken.items():
        case = str(dtype).removeprefix("torch.") + (" in training" if trains else "")
        cases.setdefault(name, []).append(case)
    return ", ".join(f"{name} ({'; '.join(said)})" for name, said in cases.items())
