"""Which scan `auto` takes: the first in order of speed that computes here what it should.

The order is that of `LIMITS`. A fused scan is tried once per process, device and dtype, with
gradients and without, on one small problem before it is relied on.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mmmamba_cli.ops.ssd.limits import LIMITS, Scan, refusal
from mmmamba_cli.ops.ssd.reference import chunked

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
