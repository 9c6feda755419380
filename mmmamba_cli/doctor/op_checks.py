"""Checks of ops: every backend against the fp64 reference on the CPU, and the scan of `auto`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.doctor.op_cases import op_specs
from mmmamba_cli.doctor.op_spec import OpCase, OpSpec, Tensors
from mmmamba_cli.doctor.report import FAILED, OK, SKIPPED, WARNING, Check, OpCheck
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.ssd import SCAN_BACKENDS
from mmmamba_cli.ops.ssd.dispatch import select_backend
from mmmamba_cli.ops.ssd.reference import ScanInputs

# Maximum relative errors from rounding, with a margin for other orders of summation.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
# Raised by a backend that does not support a case; the other cases decide.
REFUSALS = (NotImplementedError, MmmambaError)


@dataclass(frozen=True)
class CaseErrors:
    """Largest relative errors of one case; `backward` is None if the backend has no gradients."""

    forward: float
    backward: float | None


def check_ops(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    ops: list[OpSpec] | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Iterator[OpCheck]:
    """Check all backends that are registered at the time of the call.

    `progress` is called before a check that may take minutes.
    """
    threads = torch.get_num_threads()
    # On a busy machine, synchronizing threads takes longer than these small problems.
    torch.set_num_threads(1)
    try:
        yield from _check_all(op_specs() if ops is None else ops, device, dtypes, progress)
    finally:
        torch.set_num_threads(threads)


def _check_all(
    ops: list[OpSpec],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    progress: Callable[[str], object],
) -> Iterator[OpCheck]:
    for op in ops:
        if not op.cases:
            yield OpCheck(op.name, "all", "-", FAILED, None, None, 0, 0, "the doctor has no case")
            continue
        for backend in op.backends:
            if backend in op.optional and device.type == "cuda":
                progress(
                    f"checking {op.name} by {backend}, which may tune itself for minutes, once"
                )
            for dtype in dtypes:
                yield check_backend(op, backend, device, dtype)


def check_backend(op: OpSpec, backend: str, device: torch.device, dtype: torch.dtype) -> OpCheck:
    """Run all cases of an op on one backend."""
    tolerance = TOLERANCES[dtype]
    name = str(dtype).removeprefix("torch.")
    found: list[CaseErrors] = []
    refused = ""
    problem = WARNING if backend in op.optional else FAILED
    for case in op.cases:
        try:
            found.append(errors_of(op, case, backend, device, dtype))
        except REFUSALS as error:
            refused = f"refuses {case.name}: {error}"
        except Exception as error:  # noqa: BLE001  a broken kernel may raise anything
            first = (str(error).strip().splitlines() or [""])[0]
            said = f"{case.name}: {type(error).__name__}: {first}"
            return OpCheck(op.name, backend, name, problem, None, None, tolerance, len(found), said)
    if not found:
        return OpCheck(op.name, backend, name, SKIPPED, None, None, tolerance, 0, refused)
    forward = largest_error(errors.forward for errors in found)
    gradients = [errors.backward for errors in found if errors.backward is not None]
    backward = largest_error(gradients) if gradients else None
    passed = all(error <= tolerance for error in (forward, backward) if error is not None)
    said = ""
    if backward is None and op.needs_backward and backend not in op.forward_only:
        passed, said = False, "has no gradients, but is used in training"
    return OpCheck(
        op.name,
        backend,
        name,
        OK if passed else problem,
        forward,
        backward,
        tolerance,
        len(found),
        said,
    )


def errors_of(
    op: OpSpec, case: OpCase, backend: str, device: torch.device, dtype: torch.dtype
) -> CaseErrors:
    """Compare a backend with the reference on one case; both get inputs rounded to `dtype`."""
    rounded = {
        name: value.to(torch.float32 if name in case.fp32_inputs else dtype)
        for name, value in case.inputs.items()
    }
    exact = {name: value.double() for name, value in rounded.items()}
    trains = backend not in op.forward_only
    wanted, wanted_gradients = _run(case, exact, case.constants, op.reference, trains)
    here = {name: value.to(device) for name, value in rounded.items()}
    constants = {name: value.to(device) for name, value in case.constants.items()}
    found, gradients = _run(case, here, constants, backend, trains)
    forward = largest_error(map(relative_error, found, wanted))
    if gradients is None or wanted_gradients is None:
        return CaseErrors(forward, None)
    return CaseErrors(forward, largest_error(map(relative_error, gradients, wanted_gradients)))


def _run(
    case: OpCase, inputs: Tensors, constants: Tensors, backend: str, trains: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Outputs and, with `trains`, the gradients of all inputs; None if outputs have no graph."""
    leaves = {name: value.clone().requires_grad_(trains) for name, value in inputs.items()}
    outputs = case.call(leaves, constants, backend)
    if not all(output.requires_grad for output in outputs):
        return tuple(output.detach() for output in outputs), None
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [_cotangent(output) for output in outputs]
    )
    return tuple(output.detach() for output in outputs), gradients


def _cotangent(output: Tensor) -> Tensor:
    """Gradients of an output's elements; they have few bits, so that every dtype holds them."""
    weights = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (weights + 0.5).to(output.dtype).view(output.shape)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|a - b| / |b| by 2-norms in fp64; |a| if b is 0."""
    wanted = wanted.double()
    distance = float((found.double().cpu() - wanted).norm())
    return distance / (float(wanted.norm()) or 1.0)


def largest_error(errors: Iterable[float]) -> float:
    """The largest error; NaN counts as larger than any number."""
    known = list(errors)
    return math.nan if any(map(math.isnan, known)) else max(known)


# Dtypes and sizes for which the selected scan is reported.
SCAN_DTYPES = (torch.bfloat16, torch.float32)
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 1, 8, 4, 2, 64


def check_scan_backend(device: torch.device) -> Check:
    """Report the scan backend that `auto` selects, per dtype, in inference and in training.

    A warning if `auto` skips an installed backend that failed its self-test.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        selected = {
            (dtype, trains): _selected_scan(device, dtype, trains)
            for dtype in SCAN_DTYPES
            for trains in (False, True)
        }
    there = f"there are {', '.join(SCAN_BACKENDS)}; auto takes {_summary(selected)}"
    failures = dict.fromkeys(
        str(each.message) for each in caught if each.category is RuntimeWarning
    )
    if failures:
        return Check("scan", WARNING, f"{there}. " + "; ".join(failures))
    return Check("scan", OK, there)


def _selected_scan(device: torch.device, dtype: torch.dtype, trains: bool) -> str:
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


def _summary(selected: dict[tuple[torch.dtype, bool], str]) -> str:
    """`triton`, or `triton (bfloat16), chunked (float32; float32 in training)`."""
    if len(set(selected.values())) == 1:
        return next(iter(selected.values()))
    cases: dict[str, list[str]] = {}
    for (dtype, trains), name in selected.items():
        case = str(dtype).removeprefix("torch.") + (" in training" if trains else "")
        cases.setdefault(name, []).append(case)
    return ", ".join(f"{name} ({'; '.join(said)})" for name, said in cases.items())
