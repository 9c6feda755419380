"""Checks and backends of delta rules and gated linear attention, behind their public functions.

`backend="auto"` takes fla if it supports the inputs and passes its self-test, else the reference.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import compute_dtype, get_backend, optional_backend
from mmmamba_cli.ops.dispatch import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    Limits,
    Problem,
    SeededTensors,
    SelfTest,
    exceeded_limit,
    passes,
)
from mmmamba_cli.ops.recurrence import (
    MatrixBackend,
    RecurrenceBackend,
    RecurrenceInputs,
    check_inputs,
    check_step_inputs,
    empty_result,
)

LIBRARY_BACKENDS = optional_backend("fla", f"{__package__}.recurrence_fla", "scan", "fla")
# Forward only: fla's backward is wrong on Hopper with Triton 3.4 to 3.7.0, where fla refuses it.
LIMITS = {"fla": Limits((torch.bfloat16,), gradients=False, packing=False, dim_multiple=16)}


def run_scan(
    backends: Mapping[str, RecurrenceBackend], backend: str, inputs: RecurrenceInputs
) -> tuple[Tensor, Tensor]:
    """y and the final state by `backend`; raises as `ops.delta_rule` does."""
    check_inputs(inputs)
    if backend == "auto":
        backend = select_backend(backends, inputs)
    scan = get_backend(inputs.op, backend, backends)
    return scan(inputs) if inputs.v.shape[1] else empty_result(inputs)


def run_step(
    backends: Mapping[str, RecurrenceBackend], backend: str, inputs: RecurrenceInputs
) -> tuple[Tensor, Tensor]:
    """y of one token and the state after it; raises as `ops.delta_rule_step` does."""
    check_step_inputs(inputs)
    step = get_backend(inputs.op, "reference" if backend == "auto" else backend, backends)
    return step(inputs)


def run_matrix(
    backends: Mapping[str, MatrixBackend], backend: str, inputs: RecurrenceInputs
) -> Tensor:
    """The mixing matrix by `backend`; raises as `ops.delta_rule_matrix` does."""
    check_inputs(inputs)
    matrix = get_backend(inputs.op, "reference" if backend == "auto" else backend, backends)
    batch, length, heads, _ = inputs.q.shape
    if not length:
        dtype = compute_dtype(inputs.k)
        return torch.zeros(batch, heads, 0, 0, dtype=dtype, device=inputs.q.device)
    return matrix(inputs)


def unsupported_reason(backend: str, inputs: RecurrenceInputs) -> str | None:
    """Why the backend cannot run these inputs, as the end of a sentence; None if it can."""
    tokens = {"v": inputs.v, "k": inputs.k, "q": inputs.q}
    packed = inputs.seq_idx is not None
    return exceeded_limit(LIMITS[backend], tokens, inputs.float_tensors, packed=packed)


def check_supported(backend: str, inputs: RecurrenceInputs) -> None:
    """Raise MmmambaError with the reason if the backend cannot run these inputs."""
    reason = unsupported_reason(backend, inputs)
    if reason is not None:
        raise MmmambaError(
            f"{inputs.op}: the {backend} backend {reason}", hint="leave the backend on auto"
        )


def select_backend(backends: Mapping[str, RecurrenceBackend], inputs: RecurrenceInputs) -> str:
    """The name of the backend that `auto` uses for these inputs."""
    length = inputs.v.shape[1]
    if length < 2:
        return "recurrent" if length else "chunked"
    for name in LIMITS:
        if name in backends and unsupported_reason(name, inputs) is None:
            per_channel = inputs.log_decay.dim() == inputs.q.dim()
            # fla has one kernel for each kind of decay.
            op = f"{inputs.op} with a decay per {'channel' if per_channel else 'head'}"
            test = SelfTest(op, name, str(inputs.v.device), inputs.v.dtype, inputs.needs_grad)
            if passes(test, backends[name], _problem(inputs, backends, per_channel)):
                return name
    return "chunked"


def _problem(
    inputs: RecurrenceInputs, backends: Mapping[str, RecurrenceBackend], per_channel: bool
) -> Problem:
    """The self-test of the op of `inputs`, with its kind of decay."""

    def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
        rng, channels = SeededTensors(), (DIM,) if per_channel else ()
        keys = rng.normal(BATCH, LENGTH, KV_HEADS, DIM)
        made = {
            "v": rng.normal(BATCH, LENGTH, KV_HEADS, DIM).to(dtype),
            "k": (keys / keys.norm(dim=-1, keepdim=True)).to(dtype),
            "q": rng.normal(BATCH, LENGTH, HEADS, DIM).to(dtype),
            "log_decay": -rng.uniform(-7, 2, BATCH, LENGTH, HEADS, *channels).exp(),
            "initial_state": rng.normal(BATCH, HEADS, DIM, DIM),
        }
        if inputs.beta is not None:
            made["beta"] = rng.uniform(0, 1, BATCH, LENGTH, HEADS)
        return made

    def run(backend: RecurrenceBackend, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tokens = (given["v"], given["k"], given["q"], given["log_decay"], given.get("beta"))
        return backend(RecurrenceInputs(inputs.op, *tokens, initial_state=given["initial_state"]))

    return Problem(tensors, run, backends["chunked"])
