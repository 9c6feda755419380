"""Which scan `auto` takes: the first in order of speed that computes here what it should.

The order is that of `LIMITS`. A fused scan is tried once per process, device and dtype, with
gradients and without, on one small problem before it is relied on.

What each fused scan can take: `auto` asks it before it chooses, an adapter before it calls.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.backends import MAX_GRID_ROWS, fits_grid, suits_triton, wants_gradients
from mmmamba_cli.ops.ssd.reference import chunked


class Limits(NamedTuple):
    """Dtypes of x, B and C; whether gradients and packed rows can be had; sizes of P and N.

    A dtype is left out where matrix products would have fewer digits than it has.
    """

    dtypes: tuple[torch.dtype, ...]
    gradients: bool = True
    packing: bool = True
    # A head's state has to fit into the registers of one program.
    most_dims: int = 256
    multiple: int = 1


# The fastest first: `benchmarks/kernels.py` times triton and mamba_ssm. fla was not timed; it comes
# last because it takes the least. In both libraries fp32 products are TF32, and states between
# chunks have the dtype of x, B and C. fla's backward is wrong on Hopper with Triton 3.4 to 3.7.0,
# where it refuses.
LIMITS = {
    "triton": Limits((torch.bfloat16, torch.float16, torch.float32)),
    "mamba_ssm": Limits((torch.bfloat16,)),
    "fla": Limits((torch.bfloat16,), gradients=False, packing=False, multiple=16),
}


class Scan(NamedTuple):
    """What a choice depends on: arguments of `ops.ssd`, checked."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dt_bias: Tensor | None
    D: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None

    @property
    def trains(self) -> bool:
        return wants_gradients(*self[:-1])


def refusal(backend: str, asked: Scan) -> str | None:
    """Why that backend cannot run this, as the end of a sentence; None if it can."""
    limits = LIMITS[backend]
    if not suits_triton(*asked[:-1]):
        return "wants tensors on a GPU that has bf16, none of them in fp64"
    if any(tensor.dtype not in limits.dtypes for tensor in (asked.x, asked.B, asked.C)):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in limits.dtypes)
        return f"multiplies x, B and C in {names} only"
    dims = (asked.x.shape[-1], asked.B.shape[-1])
    if max(dims) > limits.most_dims or any(dim % limits.multiple for dim in dims):
        return (
            f"takes value and state dims of at most {limits.most_dims} that are multiples of "
            f"{limits.multiple}, not {dims[0]} and {dims[1]}"
        )
    if not fits_grid(len(asked.x)):
        return f"takes at most {MAX_GRID_ROWS:,} rows, not {len(asked.x):,}"
    if asked.trains and not limits.gradients:
        return "has no gradient that can be relied on; run it under torch.no_grad()"
    if asked.seq_idx is not None and not limits.packing:
        return "takes no packed rows (seq_idx)"
    return None


def refuse(backend: str, asked: Scan) -> None:
    """MmmambaError with the reason if that backend cannot run this."""
    reason = refusal(backend, asked)
    if reason is not None:
        raise MmmambaError(f"ssd: the {backend} backend {reason}", hint="leave the backend on auto")


# Relative errors by 2-norm, those of `mmmamba doctor`; fp16 rounds y to 11 bits.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# More than two chunks of the fused scans and no multiple of anything; grouped heads.
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 131, 4, 2, 64
NAMES = ("x", "dt", "A", "B", "C", "dt_bias", "D", "initial_state")
TOKENS = frozenset({"x", "dt", "B", "C"})

Tensors = dict[str, Tensor]


class Trial(NamedTuple):
    """One fused scan, somewhere, in a dtype of x, B and C, with gradients or without."""

    backend: str
    device: str
    dtype: torch.dtype
    trains: bool


# What came of the trials of this process.
_passed: dict[Trial, bool] = {}


def choose(backends: Mapping[str, Callable[..., Any]], asked: Scan) -> str:
    """The name of the scan that `auto` takes for this."""
    length = asked.x.shape[1]
    if length < 2:
        return "recurrent" if length else "chunked"
    for name in LIMITS:
        if name in backends and refusal(name, asked) is None:
            same = asked.x.dtype == asked.B.dtype == asked.C.dtype
            dtype = asked.x.dtype if same else torch.float32
            if passes(Trial(name, str(asked.x.device), dtype, asked.trains), backends[name]):
                return name
    return "chunked"


def passes(trial: Trial, scan: Callable[..., Any]) -> bool:
    """Whether it computed what it should, tried now if it never was.

    Where it cannot be tried now it counts as right, until it can.
    """
    if trial not in _passed:
        if _is_recorded(trial.device):
            return True
        said = _fault(trial, scan)
        _passed[trial] = said is None
        if said is not None:
            name = str(trial.dtype).removeprefix("torch.")
            warnings.warn(
                f"ssd: auto passes over the {trial.backend} backend in {name} on {trial.device}, "
                f"where {said}. `mmmamba doctor` shows what is wrong on this machine; results are "
                "right, and slower",
                RuntimeWarning,
                stacklevel=4,
            )
    return _passed[trial]


def _is_recorded(device: str) -> bool:
    """Whether what is computed now is noted down rather than done: graphs, compilers, modes."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return device.startswith("cuda") and torch.cuda.is_current_stream_capturing()


def _fault(trial: Trial, scan: Callable[..., Any]) -> str | None:
    """What is wrong with a scan, as the end of a sentence; None if nothing is."""
    device, tolerance = torch.device(trial.device), TOLERANCES[trial.dtype]
    given = _problem(trial.dtype)
    try:
        found = _run(scan, {n: t.to(device) for n, t in given.items()}, trial.trains)
    except torch.OutOfMemoryError:
        # Nothing was learnt, and there is none for what was asked either.
        raise
    except Exception as error:  # noqa: BLE001  a broken library or kernel may raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        return f"it fails: {type(error).__name__}: {first}"
    exact = {name: tensor.double() for name, tensor in given.items()}
    # In fp64 on the CPU, where no setting of the GPU's arithmetic reaches it.
    wanted = _run(chunked, exact, trial.trains)
    for name, right in wanted.items():
        distance = _distance(found[name], right)
        # NaN is not at most anything.
        if not distance <= tolerance:
            return f"its {name} is off by {distance:.2g}, allowed is {tolerance:.2g}"
    return None


def _run(scan: Callable[..., Any], given: Tensors, trains: bool) -> dict[str, Tensor]:
    """Outputs and, where it trains, gradients, whatever the caller is in the middle of.

    It trains only where gradients are recorded, so that no mode has to be changed. Hooks of its own
    keep those of activation checkpointing from counting these tensors.
    """
    with saved_tensors_hooks(_same, _same):
        leaves = {n: t.detach().clone().requires_grad_(trains) for n, t in given.items()}
        outputs = scan(
            *(leaves[name] for name in NAMES[:5]),
            dt_bias=leaves["dt_bias"],
            dt_softplus=True,
            D=leaves["D"],
            initial_state=leaves["initial_state"],
            mask=None,
            seq_idx=None,
            chunk_size=64,
        )
        found = dict(zip(("y", "state"), outputs, strict=True))
        if trains:
            weights = [_weights(output) for output in outputs]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
            found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    # What is done with them afterwards is no part of anybody's graph.
    return {name: tensor.detach() for name, tensor in found.items()}


def _problem(dtype: torch.dtype) -> Tensors:
    """The same numbers everywhere, tokens rounded to `dtype`, parameters and state in fp32."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cpu", dtype=torch.float32)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        numbers = torch.rand(*shape, generator=rng, device="cpu", dtype=torch.float32)
        return low + (high - low) * numbers

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
    return {n: t.to(dtype) if n in TOKENS else t for n, t in tensors.items()}


def _weights(output: Tensor) -> Tensor:
    """Weights of an output's elements: few bits each, so that no dtype rounds them."""
    numbers = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (numbers + 0.5).to(output.dtype).view(output.shape)


def _distance(found: Tensor, wanted: Tensor) -> float:
    """|a - b| / |b| by 2-norms in fp64."""
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def _same(tensor: Tensor) -> Tensor:
    return tensor
