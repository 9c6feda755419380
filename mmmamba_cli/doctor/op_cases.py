"""Small random problems for every op: odd lengths, padding, packing, states going in.

Legend: B batch, T tokens, H query heads, K key/value heads, P head dim, Ch channels, W taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli import ops
from mmmamba_cli.ops.attention import varlen_metadata
from mmmamba_cli.ops.decode import MixerWeights
from mmmamba_cli.ops.projection import Int8Weight
from mmmamba_cli.ops.ssd.dispatch import LIMITS

# Arguments by their names; of a convolution some others are no tensors, so that mypy wants Any.
Tensors = dict[str, Any]
# Values and fixed arguments (masks, ids) of a case, and a backend's name, to the outputs.
Call = Callable[[Tensors, Tensors, str], tuple[Tensor, ...]]

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 32
CHANNELS, TAPS = 2 * DIM + 1, 4
# What is called in decoding only, besides single steps.
DECODING = frozenset({"likeliest", "project"})
# Neither a multiple of 8 nor of a chunk; 1 is the step of a decoder, 131 wants two chunks.
LENGTHS = (1, 37, 131)
EPS = 1e-5
NONE: frozenset[str] = frozenset()
# Scans of other libraries, and those of them that have no gradients.
FOREIGN = frozenset(LIMITS) - {"triton"}
FORWARD_ONLY = frozenset(name for name, limits in LIMITS.items() if not limits.gradients)


@dataclass(frozen=True)
class Case:
    """`values` fp64 on the CPU, of which gradients are asked; `fixed` masks and ids.

    `small` are values that a model keeps in fp32 though it runs in bf16.
    """

    name: str
    call: Call
    values: Tensors
    fixed: Tensors = field(default_factory=dict)
    small: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Op:
    """A public function: its backends, the one that is its reference, and cases for it.

    `trains` says that it must have gradients; one decoding step need not, nor need backends that
    are `forward_only`. `optional` backends come with other libraries, and whoever calls the op does
    without them where they are wrong.
    """

    name: str
    backends: Mapping[str, Callable[..., Any]]
    reference: str
    cases: tuple[Case, ...]
    trains: bool = True
    forward_only: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


def all_ops() -> list[Op]:
    """Every op that has backends, with cases if there are any here."""
    makers: dict[str, tuple[str, Callable[[], list[Case]]]] = {
        "ssd": ("recurrent", _scans),
        "ssd_step": ("reference", _scan_steps),
        "causal_conv": ("reference", _convolutions),
        "causal_conv_step": ("reference", _convolution_steps),
        "gated_rms_norm": ("reference", _gated_norms),
        "attention": ("reference", _attentions),
        "attention_step": ("reference", _attention_steps),
        "likeliest": ("reference", _choices),
        "mixer_step": ("reference", _mixer_steps),
        "project": ("reference", _products),
        "rms_norm": ("reference", _norms),
    }
    found = []
    for name, backends in ops.BACKENDS.items():
        reference, make = makers.get(name, ("reference", list))
        trains = name not in DECODING and not name.endswith("_step")
        forward_only, optional = (FORWARD_ONLY, FOREIGN) if name == "ssd" else (NONE, NONE)
        cases = tuple(make())
        found.append(Op(name, backends, reference, cases, trains, forward_only, optional))
    return found


class _Random:
    """Numbers that are the same everywhere."""

    def __init__(self, seed: int):
        self._rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._rng, dtype=torch.float64)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self._rng, dtype=torch.float64)


def _mask(length: int) -> Tensor:
    """(B, T): one row padded on the left, one on the right."""
    mask = torch.ones(BATCH, length, dtype=torch.bool)
    mask[0, : length // 5] = False
    mask[1, -(length // 4) :] = False
    return mask


def _packing(length: int) -> Tensor:
    """(B, T): three sequences in a row, cut elsewhere in each."""
    columns = torch.arange(length)
    return torch.stack([(columns > c).long() + (columns > 2 * c).long() for c in (5, length // 3)])


def _scans() -> list[Case]:
    found = [Case(f"{length} tokens", _scan, *_scan_values(length)) for length in LENGTHS]
    values, _, small = _scan_values(LENGTHS[1])
    for name, fixed in (("mask", _mask), ("seq_idx", _packing)):
        found.append(Case(name, _scan, values, {name: fixed(LENGTHS[1])}, small))
    return found


def _scan_values(length: int) -> tuple[Tensors, Tensors, frozenset[str]]:
    rng = _Random(length)
    values = {
        "x": rng.normal(BATCH, length, KV_HEADS, DIM),
        "dt": rng.uniform(-5, 2, BATCH, length, HEADS),
        "A": -rng.uniform(0.05, 4, HEADS),
        "B": rng.normal(BATCH, length, KV_HEADS, DIM) / math.sqrt(DIM),
        "C": rng.normal(BATCH, length, HEADS, DIM),
        "dt_bias": rng.normal(HEADS),
        "D": rng.normal(HEADS),
        "initial_state": rng.normal(BATCH, HEADS, DIM, DIM),
    }
    return values, {}, frozenset({"A", "dt_bias", "D", "initial_state"})


def _scan(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.ssd(**values, **fixed, dt_softplus=True, chunk_size=64, backend=backend)


def _scan_steps() -> list[Case]:
    values, _, small = _scan_values(1)
    one = {n: v[:, 0] if n in ("x", "dt", "B", "C") else v for n, v in values.items()}
    one["state"] = one.pop("initial_state")
    return [Case("one token", _scan_step, one, {}, (small - {"initial_state"}) | {"state"})]


def _scan_step(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.ssd_step(**values, dt_softplus=True, backend=backend)


def _convolutions() -> list[Case]:
    found = []
    for length in LENGTHS:
        rng = _Random(length)
        values = {
            "x": rng.normal(BATCH, length, CHANNELS),
            "weight": rng.normal(CHANNELS, TAPS),
            "bias": rng.normal(CHANNELS),
            "initial_state": rng.normal(BATCH, CHANNELS, TAPS - 1),
        }
        found.append(Case(f"{length} tokens", _convolve, values))
        if length == LENGTHS[1]:
            found.append(Case("mask", _convolve, values, {"mask": _mask(length)}))
            found.append(Case("seq_idx", _convolve, values, {"seq_idx": _packing(length)}))
    return found


def _convolve(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.causal_conv(**values, **fixed, backend=backend)


def _convolution_steps() -> list[Case]:
    rng = _Random(0)
    values = {
        "x": rng.normal(BATCH, CHANNELS),
        "weight": rng.normal(CHANNELS, TAPS),
        "bias": rng.normal(CHANNELS),
        "state": rng.normal(BATCH, CHANNELS, TAPS - 1),
    }
    return [Case("one token", _convolve_step, values)]


def _convolve_step(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.causal_conv_step(**values, backend=backend)


def _gated_norms() -> list[Case]:
    found = []
    for length in LENGTHS:
        rng = _Random(length)
        values = {
            "y": rng.normal(BATCH, length, HEADS, DIM),
            "gate": rng.normal(BATCH, length, HEADS, DIM),
            "weight": rng.uniform(0.5, 2, DIM),
        }
        found.append(Case(f"{length} tokens", _gate, values, {}, frozenset({"weight"})))
    return found


def _gate(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.gated_rms_norm(**values, eps=EPS, backend=backend),)


def _norms() -> list[Case]:
    found = []
    for length in LENGTHS:
        rng = _Random(length)
        values = {"x": rng.normal(BATCH, length, CHANNELS), "weight": rng.uniform(0.5, 2, CHANNELS)}
        found.append(Case(f"{length} tokens", _norm, values, {}, frozenset({"weight"})))
    return found


def _norm(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.rms_norm(**values, eps=EPS, backend=backend),)


def _mixer_steps() -> list[Case]:
    rng = _Random(0)
    channels = (HEADS + 2 * KV_HEADS) * DIM
    values = {
        "vkq": rng.normal(BATCH, channels),
        "dt": rng.uniform(-5, 2, BATCH, HEADS),
        "conv_ring": rng.normal(BATCH, channels, TAPS),
        "ssm_state": rng.normal(BATCH, HEADS, DIM, DIM),
        "conv_weight": rng.normal(channels, TAPS),
        "conv_bias": rng.normal(channels),
        "A": -rng.uniform(0.05, 4, HEADS),
        "dt_bias": rng.normal(HEADS),
        "D": rng.normal(HEADS),
    }
    small = frozenset({"ssm_state", "A", "dt_bias", "D"})
    return [Case("one token", _mixer_step, values, {"position": torch.tensor([6])}, small)]


def _mixer_step(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    # Changed in place, and wanted as they were for the next backend.
    ring, state = values["conv_ring"].clone(), values["ssm_state"].clone()
    weights = MixerWeights(**{name: values[name] for name in MixerWeights._fields})
    y = ops.mixer_step(
        values["vkq"], values["dt"], ring, state, fixed["position"], weights, backend=backend
    )
    return y, ring, state


def _attention_steps() -> list[Case]:
    found = []
    for length in LENGTHS:
        rng = _Random(length)
        angles = rng.normal(BATCH, DIM // 2).repeat(1, 2)
        values = {
            "q": rng.normal(BATCH, HEADS, DIM),
            "k": rng.normal(BATCH, KV_HEADS, DIM),
            "v": rng.normal(BATCH, KV_HEADS, DIM),
            "keys": rng.normal(BATCH, KV_HEADS, length, DIM),
            "values": rng.normal(BATCH, KV_HEADS, length, DIM),
            "cos": angles.cos(),
            "sin": angles.sin(),
        }
        fixed = {"position": torch.tensor([length - 1])}
        found.append(Case(f"{length} tokens", _attention_step, values, fixed))
        if length == LENGTHS[1]:
            padded = {**fixed, "starts": torch.tensor([length // 5, 0])}
            found.append(Case("starts", _attention_step, values, padded))
    return found


def _attention_step(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    cache = {name: values[name].clone() for name in ("keys", "values")}
    given = {**values, **cache, "starts": None, **fixed}
    return ops.attention_step(**given, backend=backend), *cache.values()


def _choices() -> list[Case]:
    logits = _Random(0).normal(BATCH, 1000)
    suppressed = torch.zeros(1000, dtype=torch.bool)
    suppressed[logits.argmax(-1)] = True
    return [Case("greedy", _choose, {"logits": logits}, {"suppressed": suppressed})]


def _choose(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    ids = ops.greedy_argmax(values["logits"], fixed["suppressed"], backend=backend)
    # The logit of the id: where bf16 makes two equal, either may be taken.
    return (values["logits"].gather(1, ids.unsqueeze(1)),)


def _products() -> list[Case]:
    rng = _Random(0)
    width, rows = HEADS * DIM, 2 * CHANNELS
    plain = {"x": rng.normal(BATCH, width), "weight": rng.normal(rows, width)}
    values = {**plain, "norm": rng.uniform(0.5, 2, width), "bias": rng.normal(rows)}
    gated = {**plain, "norm": rng.uniform(0.5, 2, DIM), "gate": rng.normal(BATCH, width)}
    gated["residual"] = rng.normal(BATCH, rows)
    steps = {
        "steps": torch.arange(rows * width).mul(37).remainder(255).sub(127).char().view(rows, -1),
        "scales": (1 + torch.arange(rows) % 5) / 100,
    }
    small = frozenset({"norm"})
    return [
        Case("normed, SwiGLU", _swiglu, values, {}, small),
        Case("gated, residual", _project, gated, {}, small),
        Case("int8", _project_int8, {"x": plain["x"]}, steps),
        Case("int8, normed", _normed_int8, {"x": plain["x"]}, steps),
    ]


def _project(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.project(**values, eps=EPS, backend=backend),)


def _swiglu(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.project(**values, eps=EPS, swiglu=True, backend=backend),)


def _project_int8(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    weight = Int8Weight(fixed["steps"], fixed["scales"])
    return (ops.project(values["x"], weight, backend=backend),)


def _normed_int8(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    weight, x = Int8Weight(fixed["steps"], fixed["scales"]), values["x"]
    return (ops.project(x, weight, norm_dim=x.shape[1], eps=EPS, backend=backend),)


def _attentions() -> list[Case]:
    found = []
    for length in LENGTHS:
        rng = _Random(length)
        values = {
            "q": rng.normal(BATCH, HEADS, length, DIM),
            "k": rng.normal(BATCH, KV_HEADS, length, DIM),
            "v": rng.normal(BATCH, KV_HEADS, length, DIM),
        }
        found.append(Case(f"{length} tokens", _attend, values))
        if length == LENGTHS[1]:
            found.append(Case("mask", _attend, values, {"mask": _attention_mask(length)}))
            ends = torch.arange(length).expand(BATCH, -1) < length - 3
            packed = {"real": ends, "seq_idx": _packing(length)}
            for name, fixed in (("padded", {"real": _mask(length)}), ("packed", packed)):
                found.append(Case(name, _attend_segments, values, fixed))
    return found


def _attention_mask(length: int) -> Tensor:
    """(B, 1, T, T): causal, blind to padding; a padding query sees itself, as in the model."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal & (_mask(length)[:, None, None, :] | torch.eye(length, dtype=torch.bool))


def _attend(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    mask = fixed.get("mask")
    return (ops.attention(**values, mask=mask, is_causal=mask is None, backend=backend),)


def _attend_segments(values: Tensors, fixed: Tensors, backend: str) -> tuple[Tensor, ...]:
    varlen = varlen_metadata(fixed["real"], fixed.get("seq_idx"))
    y = ops.attention(**values, varlen=varlen, backend=backend)
    # Whatever is at padding is nobody's.
    return (y.where(fixed["real"][:, None, :, None], 0),)
