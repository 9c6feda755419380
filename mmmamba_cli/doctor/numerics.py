"""Every backend of every op against the op's reference in fp64 on the CPU, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.doctor.op_cases import Case, Op, Tensors, all_ops
from mmmamba_cli.doctor.report import FAILED, OK, SKIPPED, WARNING, OpCheck
from mmmamba_cli.errors import MmmambaError

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
