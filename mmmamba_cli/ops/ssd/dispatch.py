"""Selection of the scan backend for `backend="auto"`.

`auto` takes the first backend in the order of `LIMITS` that supports the inputs and passes its
self-test.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mmmamba_cli.errors import MmmambaError
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
from mmmamba_cli.ops.ssd.reference import ScanBackend, ScanInputs, chunked

# Fastest first: `benchmarks/kernels.py` times triton and mamba_ssm. fla is not timed and comes
# last because it supports the least. Both libraries compute fp32 products in TF32 and keep the
# states between chunks in the dtype of x, B and C. fla's backward is wrong on Hopper with Triton
# 3.4 to 3.7.0, where fla refuses to run it.
LIMITS = {
    "triton": Limits((torch.bfloat16, torch.float16, torch.float32)),
    "mamba_ssm": Limits((torch.bfloat16,)),
    "fla": Limits((torch.bfloat16,), gradients=False, packing=False, dim_multiple=16),
}


def unsupported_reason(backend: str, inputs: ScanInputs) -> str | None:
    """Why the backend cannot run these inputs, as the end of a sentence; None if it can."""
    tokens = {"x": inputs.x, "B": inputs.B, "C": inputs.C}
    packed = inputs.seq_idx is not None
    return exceeded_limit(LIMITS[backend], tokens, inputs.float_tensors, packed=packed)


def check_supported(backend: str, inputs: ScanInputs) -> None:
    """Raise MmmambaError with the reason if the backend cannot run these inputs."""
    reason = unsupported_reason(backend, inputs)
    if reason is not None:
        raise MmmambaError(f"ssd: the {backend} backend {reason}", hint="leave the backend on auto")


def select_backend(backends: Mapping[str, ScanBackend], inputs: ScanInputs) -> str:
    """The name of the backend that `auto` uses for these inputs."""
    length = inputs.x.shape[1]
    if length < 2:
        return "recurrent" if length else "chunked"
    for name in LIMITS:
        if name in backends and unsupported_reason(name, inputs) is None:
            same = inputs.x.dtype == inputs.B.dtype == inputs.C.dtype
            dtype = inputs.x.dtype if same else torch.float32
            test = SelfTest("ssd", name, str(inputs.x.device), dtype, inputs.needs_grad)
            if passes(test, backends[name], PROBLEM):
                return name
    return "chunked"


def _test_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs: tokens in `dtype`, parameters and state in fp32."""
    rng = SeededTensors()
    tensors = {
        "x": rng.normal(BATCH, LENGTH, KV_HEADS, DIM),
        "dt": rng.uniform(-5, 2, BATCH, LENGTH, HEADS),
        "A": -rng.uniform(0.05, 4, HEADS),
        "B": rng.normal(BATCH, LENGTH, KV_HEADS, DIM) / DIM**0.5,
        "C": rng.normal(BATCH, LENGTH, HEADS, DIM),
        "dt_bias": rng.normal(HEADS),
        "D": rng.normal(HEADS),
        "initial_state": rng.normal(BATCH, HEADS, DIM, DIM),
    }
    return {n: t.to(dtype) if n in ("x", "dt", "B", "C") else t for n, t in tensors.items()}


def _run_test(scan: ScanBackend, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    inputs = ScanInputs(**tensors, dt_softplus=True, mask=None, seq_idx=None, chunk_size=64)
    return scan(inputs)


PROBLEM = Problem(_test_tensors, _run_test, chunked)
