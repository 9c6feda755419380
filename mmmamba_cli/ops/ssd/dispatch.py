"""Selection of the scan backend for `backend="auto"`: capability limits and a self-test.

`auto` takes the first backend in the order of `LIMITS` that supports the inputs and passes the
self-test, which compares it with the reference on one small problem, once per process, device,
dtype and with or without gradients.
"""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import MAX_GRID_ROWS, fits_grid, supports_triton
from mmmamba_cli.ops.ssd.reference import ScanBackend, ScanInputs, chunked


class Limits(NamedTuple):
    """What a fused backend supports.

    dtypes: of x, B and C; without those whose matrix products would be rounded to fewer bits.
    gradients, packing: whether it has a backward pass, and whether it takes `seq_idx`.
    max_dim, dim_multiple: P and N are at most the one and multiples of the other.
    """

    dtypes: tuple[torch.dtype, ...]
    gradients: bool = True
    packing: bool = True
    # The state of a head must fit into the registers of one program.
    max_dim: int = 256
    dim_multiple: int = 1


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
    limits = LIMITS[backend]
    if not supports_triton(*inputs.float_tensors):
        return "needs tensors on a GPU that has bf16, none of them in fp64"
    if any(tensor.dtype not in limits.dtypes for tensor in (inputs.x, inputs.B, inputs.C)):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
        return f"multiplies x, B and C in {names} only"
    dims = (inputs.x.shape[-1], inputs.B.shape[-1])
    if max(dims) > limits.max_dim or any(dim % limits.dim_multiple for dim in dims):
        return (
            f"takes value and state dims of at most {limits.max_dim} that are multiples of "
            f"{limits.dim_multiple}, not {dims[0]} and {dims[1]}"
        )
    if not fits_grid(len(inputs.x)):
        return f"takes at most {MAX_GRID_ROWS:,} rows, not {len(inputs.x):,}"
    if inputs.needs_grad and not limits.gradients:
        return "has no gradient that can be relied on; run it under torch.no_grad()"
    if inputs.seq_idx is not None and not limits.packing:
        return "takes no packed rows (seq_idx)"
    return None


def check_supported(backend: str, inputs: ScanInputs) -> None:
    """Raise MmmambaError with the reason if the backend cannot run these inputs."""
    reason = unsupported_reason(backend, inputs)
    if reason is not None:
        raise MmmambaError(f"ssd: the {backend} backend {reason}", hint="leave the backend on auto")


# Maximum relative errors by 2-norm, as in `mmmamba doctor`; fp16 rounds y to 11 bits.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Sizes of the self-test: more than two chunks of every fused backend with a partial last chunk,
# and two query heads per key/value head.
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 131, 4, 2, 64
TOKEN_TENSORS = frozenset({"x", "dt", "B", "C"})


class SelfTest(NamedTuple):
    """One self-test: a backend on a device, in a dtype of x, B and C, with or without gradients."""

    backend: str
    device: str
    dtype: torch.dtype
    gradients: bool


# Results of the self-tests that this process has run.
_results: dict[SelfTest, bool] = {}


def select_backend(backends: Mapping[str, ScanBackend], inputs: ScanInputs) -> str:
    """The name of the backend that `auto` uses for these inputs."""
    length = inputs.x.shape[1]
    if length < 2:
        return "recurrent" if length else "chunked"
    for name in LIMITS:
        if name in backends and unsupported_reason(name, inputs) is None:
            same = inputs.x.dtype == inputs.B.dtype == inputs.C.dtype
            dtype = inputs.x.dtype if same else torch.float32
            test = SelfTest(name, str(inputs.x.device), dtype, inputs.needs_grad)
            if passes(test, backends[name]):
                return name
    return "chunked"


def passes(test: SelfTest, scan: ScanBackend) -> bool:
    """Whether the backend passed its self-test; runs the test on first use.

    While tracing or capturing, an untested backend counts as passed and stays untested.
    """
    if test not in _results:
        if _is_tracing(test.device):
            return True
        failure = _failure(test, scan)
        _results[test] = failure is None
        if failure is not None:
            name = str(test.dtype).removeprefix("torch.")
            warnings.warn(
                f"ssd: auto passes over the {test.backend} backend in {name} on {test.device}, "
                f"where {failure}. `mmmamba doctor` shows what is wrong on this machine; results "
                "are right, and slower",
                RuntimeWarning,
                stacklevel=4,
            )
    return _results[test]


def _is_tracing(device: str) -> bool:
    """Whether operations are recorded rather than run: torch.compile, dispatch mode, CUDA graph."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


def _failure(test: SelfTest, scan: ScanBackend) -> str | None:
    """What is wrong with a backend, as the end of a sentence; None if it passes."""
    device, tolerance = torch.device(test.device), TOLERANCES[test.dtype]
    inputs = _test_inputs(test.dtype)
    try:
        found = _run(scan, {n: t.to(device) for n, t in inputs.items()}, test.gradients)
    except torch.OutOfMemoryError:
        # Says nothing about the backend; the requested scan would run out of memory as well.
        raise
    except Exception as error:  # noqa: BLE001  a broken library or kernel may raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it fails: {type(error).__name__}: {first}"
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    # In fp64 on the CPU, which no setting of the GPU's arithmetic (TF32) affects.
    expected = _run(chunked, exact, test.gradients)
    for name, reference in expected.items():
        distance = _relative_error(found[name], reference)
        # `not <=` so that NaN fails.
        if not distance <= tolerance:
            return f"its {name} is off by {distance:.2g}, allowed is {tolerance:.2g}"
    return None


def _run(scan: ScanBackend, tensors: dict[str, Tensor], gradients: bool) -> dict[str, Tensor]:
    """Outputs and, with `gradients`, the gradients of all inputs; the caller's state is unaffected.

    Gradients are computed only if the caller has grad mode on, so no mode is changed. The hooks
    hide the saved tensors from the hooks of activation checkpointing, which counts them.
    """
    with saved_tensors_hooks(_identity, _identity):
        leaves = {n: t.detach().clone().requires_grad_(gradients) for n, t in tensors.items()}
        inputs = ScanInputs(**leaves, dt_softplus=True, mask=None, seq_idx=None, chunk_size=64)
        outputs = scan(inputs)
        found = dict(zip(("y", "state"), outputs, strict=True))
        if gradients:
            weights = [_output_gradient(output) for output in outputs]
            grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
            found |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    # Detach: the results must not join the caller's autograd graph.
    return {name: tensor.detach() for name, tensor in found.items()}


def _test_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs, equal on every machine: tokens in `dtype`, parameters and state in fp32."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cpu", dtype=torch.float32)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        samples = torch.rand(*shape, generator=rng, device="cpu", dtype=torch.float32)
        return low + (high - low) * samples

    tensors = {
        "x": normal(BATCH, LENGTH, KV_HEADS, DIM),
        "dt": uniform(-5, 2, BATCH, LENGTH, HEADS),
        "A": -uniform(0.05, 4, HEADS),
        "B": normal(BATCH, LENGTH, KV_HEADS, DIM) / DIM**0.5,
        "C": normal(BATCH, LENGTH, HEADS, DIM),
        "dt_bias": normal(HEADS),
        "D": normal(HEADS),
        "initial_state": normal(BATCH, HEADS, DIM, DIM),
    }
    return {n: t.to(dtype) if n in TOKEN_TENSORS else t for n, t in tensors.items()}


def _output_gradient(output: Tensor) -> Tensor:
    """Gradients of an output's elements; they have few bits, so that every dtype holds them."""
    steps = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (steps + 0.5).to(output.dtype).view(output.shape)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b| by 2-norms in fp64."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


def _identity(tensor: Tensor) -> Tensor:
    return tensor
