"""Selection of fused backends for `backend="auto"`: capability limits and a self-test.

The self-test compares a backend with the reference on one small problem, once per process, device,
dtype and with or without gradients.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmmamba_cli.ops.backends import MAX_GRID_ROWS, fits_grid, needs_grad, supports_triton


class Limits(NamedTuple):
    """What a fused backend supports.

    dtypes: of values, keys and queries; without those whose matrix products would be rounded to
        fewer bits.
    gradients, packing: whether it has a backward pass, and whether it takes `seq_idx`.
    max_dim, dim_multiple: value and state dims are at most the one and multiples of the other.
    """

    dtypes: tuple[torch.dtype, ...]
    gradients: bool = True
    packing: bool = True
    # The state of a head must fit into the registers of one program.
    max_dim: int = 256
    dim_multiple: int = 1


def exceeded_limit(
    limits: Limits,
    tokens: Mapping[str, Tensor],
    float_tensors: Iterable[Tensor | None],
    *,
    packed: bool,
) -> str | None:
    """Why a backend with these limits cannot run the inputs, as the end of a sentence, or None.

    `tokens` are values, keys and queries by name, in this order, (B, T, heads, dim) each.
    """
    given = tuple(float_tensors)
    if not supports_triton(*given):
        return "needs tensors on a GPU that has bf16, none of them in fp64"
    values, keys, _ = tokens.values()
    if any(tensor.dtype not in limits.dtypes for tensor in tokens.values()):
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
        names = list(tokens)
        return f"multiplies {', '.join(names[:-1])} and {names[-1]} in {dtypes} only"
    dims = (values.shape[-1], keys.shape[-1])
    if max(dims) > limits.max_dim or any(dim % limits.dim_multiple for dim in dims):
        return (
            f"takes value and state dims of at most {limits.max_dim} that are multiples of "
            f"{limits.dim_multiple}, not {dims[0]} and {dims[1]}"
        )
    if not fits_grid(len(values)):
        return f"takes at most {MAX_GRID_ROWS:,} rows, not {len(values):,}"
    if not limits.gradients and needs_grad(*given):
        return "has no gradient that can be relied on; run it under torch.no_grad()"
    if packed and not limits.packing:
        return "takes no packed rows (seq_idx)"
    return None


# Maximum relative errors by 2-norm, as in `mmmamba doctor`; fp16 rounds y to 11 bits.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Sizes of the self-test: more than two chunks of every fused backend with a partial last chunk,
# and two query heads per key/value head.
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 131, 4, 2, 64


class SelfTest(NamedTuple):
    """One self-test: a backend of an op on a device, in a dtype, with or without gradients.

    dtype: of values, keys and queries.
    """

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    gradients: bool


class Problem(NamedTuple):
    """The inputs of an op's self-test.

    tensors: makes them on the CPU, equal on every machine; tokens are in the given dtype.
    run: calls a backend with them and returns y and the state.
    reference: the backend that is right.
    """

    tensors: Callable[[torch.dtype], dict[str, Tensor]]
    run: Callable[[Callable[..., Any], dict[str, Tensor]], tuple[Tensor, Tensor]]
    reference: Callable[..., Any]


class SeededTensors:
    """Random fp32 tensors on the CPU, equal on every machine; no global state is used."""

    def __init__(self) -> None:
        self._rng = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._rng, device="cpu", dtype=torch.float32)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        samples = torch.rand(*shape, generator=self._rng, device="cpu", dtype=torch.float32)
        return low + (high - low) * samples


# Results of the self-tests that this process has run.
_results: dict[SelfTest, bool] = {}


def passes(test: SelfTest, backend: Callable[..., Any], problem: Problem) -> bool:
    """Whether the backend passed its self-test; runs the test on first use.

    While tracing or capturing, an untested backend counts as passed and stays untested.
    """
    if test not in _results:
        if _is_tracing(test.device):
            return True
        failure = _failure(test, backend, problem)
        _results[test] = failure is None
        if failure is not None:
            name = str(test.dtype).removeprefix("torch.")
            warnings.warn(
                f"{test.op}: auto passes over the {test.backend} backend in {name} on "
                f"{test.device}, where {failure}. `mmmamba doctor` shows what is wrong on this "
                "machine; results are right, and slower",
                RuntimeWarning,
                stacklevel=4,
            )
    return _results[test]


def _is_tracing(device: str) -> bool:
    """Whether operations are recorded rather than run: torch.compile, dispatch mode, CUDA graph."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


def _failure(test: SelfTest, backend: Callable[..., Any], problem: Problem) -> str | None:
    """What is wrong with a backend, as the end of a sentence; None if it passes."""
    device, tolerance = torch.device(test.device), TOLERANCES[test.dtype]
    tensors = problem.tensors(test.dtype)
    try:
        there = {name: tensor.to(device) for name, tensor in tensors.items()}
        found = _run(problem, backend, there, test.gradients)
    except torch.OutOfMemoryError:
        # Says nothing about the backend; the requested op would run out of memory as well.
        raise
    except Exception as error:  # noqa: BLE001  a broken library or kernel may raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it fails: {type(error).__name__}: {first}"
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    # In fp64 on the CPU, which no setting of the GPU's arithmetic (TF32) affects.
    expected = _run(problem, problem.reference, exact, test.gradients)
    for name, reference in expected.items():
        distance = _relative_error(found[name], reference)
        # `not <=` so that NaN fails.
        if not distance <= tolerance:
            return f"its {name} is off by {distance:.2g}, allowed is {tolerance:.2g}"
    return None


def _run(
    problem: Problem, backend: Callable[..., Any], tensors: dict[str, Tensor], gradients: bool
) -> dict[str, Tensor]:
    """Outputs and, with `gradients`, the gradients of all inputs; the caller's state is unaffected.

    Gradients are computed only if the caller has grad mode on, so no mode is changed. The hooks
    hide the saved tensors from the hooks of activation checkpointing, which counts them.
    """
    with saved_tensors_hooks(_identity, _identity):
        leaves = {n: t.detach().clone().requires_grad_(gradients) for n, t in tensors.items()}
        outputs = problem.run(backend, leaves)
        found = dict(zip(("y", "state"), outputs, strict=True))
        if gradients:
            weights = [_output_gradient(output) for output in outputs]
            grads = torch.autograd.grad(outputs, list(leaves.values()), weights)
            found |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    # Detach: the results must not join the caller's autograd graph.
    return {name: tensor.detach() for name, tensor in found.items()}


def _output_gradient(output: Tensor) -> Tensor:
    """Gradients of an output's elements; they have few bits, so that every dtype holds them."""
    steps = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (steps + 0.5).to(output.dtype).view(output.shape)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b| by 2-norms in fp64."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


def _identity(tensor: Tensor) -> Tensor:
    return tensor
