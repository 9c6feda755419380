"""Small random test cases for every op: odd lengths, padding, packing, initial states.

Legend: B batch, T tokens, H query heads, K key/value heads, P head dim, Ch channels, W taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmmamba_cli import ops
from mmmamba_cli.doctor.op_spec import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    TAPS,
    OpCase,
    OpSpec,
    RandomInputs,
    Tensors,
    packed_ids,
    padding_mask,
)
from mmmamba_cli.doctor.recurrence_cases import (
    delta_mixer_step_cases,
    delta_rule_cases,
    delta_rule_matrix_cases,
    delta_rule_step_cases,
    gla_cases,
    gla_matrix_cases,
    gla_step_cases,
)
from mmmamba_cli.doctor.window_cases import (
    window_attention_cases,
    window_matrix_cases,
    window_step_cases,
)
from mmmamba_cli.ops.attention import varlen_metadata
from mmmamba_cli.ops.decode import MixerWeights
from mmmamba_cli.ops.projection import Int8Weight
from mmmamba_cli.ops.recurrence_dispatch import LIMITS as RECURRENCE_LIMITS
from mmmamba_cli.ops.ssd.dispatch import LIMITS

CHANNELS = 2 * DIM + 1
# Ops of decoding besides those named `_step`; ops of decoding need no gradients.
DECODING_OPS = frozenset({"greedy_argmax", "project"})
EPS = 1e-5
# Ops with backends of other libraries, with the limits of these.
LIBRARY_OPS = {"ssd": LIMITS, "delta_rule": RECURRENCE_LIMITS, "gla": RECURRENCE_LIMITS}


def op_specs() -> list[OpSpec]:
    """One spec per op in `ops.BACKENDS`; without cases if this module has none for it."""
    makers: dict[str, tuple[str, Callable[[], list[OpCase]]]] = {
        "ssd": ("recurrent", _ssd_cases),
        "ssd_step": ("reference", _ssd_step_cases),
        "delta_mixer_step": ("reference", delta_mixer_step_cases),
        "delta_rule": ("recurrent", delta_rule_cases),
        "delta_rule_matrix": ("reference", delta_rule_matrix_cases),
        "delta_rule_step": ("reference", delta_rule_step_cases),
        "gla": ("recurrent", gla_cases),
        "gla_matrix": ("reference", gla_matrix_cases),
        "gla_step": ("reference", gla_step_cases),
        "causal_conv": ("reference", _conv_cases),
        "causal_conv_step": ("reference", _conv_step_cases),
        "gated_rms_norm": ("reference", _gated_norm_cases),
        "attention": ("reference", _attention_cases),
        "attention_step": ("reference", _attention_step_cases),
        "greedy_argmax": ("reference", _argmax_cases),
        "mixer_step": ("reference", _mixer_step_cases),
        "project": ("reference", _project_cases),
        "rms_norm": ("reference", _norm_cases),
        "window_attention": ("reference", window_attention_cases),
        "window_matrix": ("reference", window_matrix_cases),
        "window_step": ("reference", window_step_cases),
    }
    found = []
    for name, backends in ops.BACKENDS.items():
        reference, make = makers.get(name, ("reference", list))
        needs_backward = name not in DECODING_OPS and not name.endswith("_step")
        limits = LIBRARY_OPS.get(name, {})
        forward_only = frozenset(n for n, limit in limits.items() if not limit.gradients)
        optional = frozenset(limits) - {"triton"}
        cases = tuple(make())
        found.append(
            OpSpec(name, backends, reference, cases, needs_backward, forward_only, optional)
        )
    return found


def _ssd_cases() -> list[OpCase]:
    found = [OpCase(f"{length} tokens", _run_ssd, *_ssd_inputs(length)) for length in LENGTHS]
    inputs, _, fp32_inputs = _ssd_inputs(LENGTHS[1])
    for name, constants in (("mask", padding_mask), ("seq_idx", packed_ids)):
        found.append(OpCase(name, _run_ssd, inputs, {name: constants(LENGTHS[1])}, fp32_inputs))
    return found


def _ssd_inputs(length: int) -> tuple[Tensors, Tensors, frozenset[str]]:
    rng = RandomInputs(length)
    inputs = {
        "x": rng.normal(BATCH, length, KV_HEADS, DIM),
        "dt": rng.uniform(-5, 2, BATCH, length, HEADS),
        "A": -rng.uniform(0.05, 4, HEADS),
        "B": rng.normal(BATCH, length, KV_HEADS, DIM) / math.sqrt(DIM),
        "C": rng.normal(BATCH, length, HEADS, DIM),
        "dt_bias": rng.normal(HEADS),
        "D": rng.normal(HEADS),
        "initial_state": rng.normal(BATCH, HEADS, DIM, DIM),
    }
    return inputs, {}, frozenset({"A", "dt_bias", "D", "initial_state"})


def _run_ssd(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.ssd(**inputs, **constants, dt_softplus=True, chunk_size=64, backend=backend)


def _ssd_step_cases() -> list[OpCase]:
    inputs, _, fp32_inputs = _ssd_inputs(1)
    one = {n: v[:, 0] if n in ("x", "dt", "B", "C") else v for n, v in inputs.items()}
    one["state"] = one.pop("initial_state")
    return [
        OpCase("one token", _run_ssd_step, one, {}, (fp32_inputs - {"initial_state"}) | {"state"})
    ]


def _run_ssd_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.ssd_step(**inputs, dt_softplus=True, backend=backend)


def _conv_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        rng = RandomInputs(length)
        inputs = {
            "x": rng.normal(BATCH, length, CHANNELS),
            "weight": rng.normal(CHANNELS, TAPS),
            "bias": rng.normal(CHANNELS),
            "initial_state": rng.normal(BATCH, CHANNELS, TAPS - 1),
        }
        found.append(OpCase(f"{length} tokens", _run_conv, inputs))
        if length == LENGTHS[1]:
            found.append(OpCase("mask", _run_conv, inputs, {"mask": padding_mask(length)}))
            found.append(OpCase("seq_idx", _run_conv, inputs, {"seq_idx": packed_ids(length)}))
    return found


def _run_conv(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.causal_conv(**inputs, **constants, backend=backend)


def _conv_step_cases() -> list[OpCase]:
    rng = RandomInputs(0)
    inputs = {
        "x": rng.normal(BATCH, CHANNELS),
        "weight": rng.normal(CHANNELS, TAPS),
        "bias": rng.normal(CHANNELS),
        "state": rng.normal(BATCH, CHANNELS, TAPS - 1),
    }
    return [OpCase("one token", _run_conv_step, inputs)]


def _run_conv_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.causal_conv_step(**inputs, backend=backend)


def _gated_norm_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        rng = RandomInputs(length)
        inputs = {
            "y": rng.normal(BATCH, length, HEADS, DIM),
            "gate": rng.normal(BATCH, length, HEADS, DIM),
            "weight": rng.uniform(0.5, 2, DIM),
        }
        found.append(OpCase(f"{length} tokens", _run_gated_norm, inputs, {}, frozenset({"weight"})))
    return found


def _run_gated_norm(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.gated_rms_norm(**inputs, eps=EPS, backend=backend),)


def _norm_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        rng = RandomInputs(length)
        inputs = {"x": rng.normal(BATCH, length, CHANNELS), "weight": rng.uniform(0.5, 2, CHANNELS)}
        found.append(OpCase(f"{length} tokens", _run_norm, inputs, {}, frozenset({"weight"})))
    return found


def _run_norm(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.rms_norm(**inputs, eps=EPS, backend=backend),)


def _mixer_step_cases() -> list[OpCase]:
    rng = RandomInputs(0)
    channels = (HEADS + 2 * KV_HEADS) * DIM
    inputs = {
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
    fp32_inputs = frozenset({"ssm_state", "A", "dt_bias", "D"})
    return [
        OpCase("one token", _run_mixer_step, inputs, {"position": torch.tensor([6])}, fp32_inputs)
    ]


def _run_mixer_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    # The op modifies them in place; the next backend needs the originals.
    ring, state = inputs["conv_ring"].clone(), inputs["ssm_state"].clone()
    weights = MixerWeights(**{name: inputs[name] for name in MixerWeights._fields})
    y = ops.mixer_step(
        inputs["vkq"], inputs["dt"], ring, state, constants["position"], weights, backend=backend
    )
    return y, ring, state


def _attention_step_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        rng = RandomInputs(length)
        angles = rng.normal(BATCH, DIM // 2).repeat(1, 2)
        inputs = {
            "q": rng.normal(BATCH, HEADS, DIM),
            "k": rng.normal(BATCH, KV_HEADS, DIM),
            "v": rng.normal(BATCH, KV_HEADS, DIM),
            "keys": rng.normal(BATCH, KV_HEADS, length, DIM),
            "values": rng.normal(BATCH, KV_HEADS, length, DIM),
            "cos": angles.cos(),
            "sin": angles.sin(),
        }
        constants = {"position": torch.tensor([length - 1])}
        found.append(OpCase(f"{length} tokens", _run_attention_step, inputs, constants))
        if length == LENGTHS[1]:
            padded = {**constants, "starts": torch.tensor([length // 5, 0])}
            found.append(OpCase("starts", _run_attention_step, inputs, padded))
    return found


def _run_attention_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    cache = {name: inputs[name].clone() for name in ("keys", "values")}
    given = {**inputs, **cache, "starts": None, **constants}
    return ops.attention_step(**given, backend=backend), *cache.values()


def _argmax_cases() -> list[OpCase]:
    logits = RandomInputs(0).normal(BATCH, 1000)
    suppressed = torch.zeros(1000, dtype=torch.bool)
    suppressed[logits.argmax(-1)] = True
    return [OpCase("greedy", _run_argmax, {"logits": logits}, {"suppressed": suppressed})]


def _run_argmax(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    ids = ops.greedy_argmax(inputs["logits"], constants["suppressed"], backend=backend)
    # Compare logits, not ids: if rounding to bf16 makes two logits equal, either id is right.
    return (inputs["logits"].gather(1, ids.unsqueeze(1)),)


def _project_cases() -> list[OpCase]:
    rng = RandomInputs(0)
    width, rows = HEADS * DIM, 2 * CHANNELS
    plain = {"x": rng.normal(BATCH, width), "weight": rng.normal(rows, width)}
    inputs = {**plain, "norm": rng.uniform(0.5, 2, width), "bias": rng.normal(rows)}
    gated = {**plain, "norm": rng.uniform(0.5, 2, DIM), "gate": rng.normal(BATCH, width)}
    gated["residual"] = rng.normal(BATCH, rows)
    steps = {
        "steps": torch.arange(rows * width).mul(37).remainder(255).sub(127).char().view(rows, -1),
        "scales": (1 + torch.arange(rows) % 5) / 100,
    }
    fp32_inputs = frozenset({"norm"})
    return [
        OpCase("normed, SwiGLU", _run_swiglu, inputs, {}, fp32_inputs),
        OpCase("gated, residual", _run_project, gated, {}, fp32_inputs),
        OpCase("int8", _run_project_int8, {"x": plain["x"]}, steps),
        OpCase("int8, normed", _run_normed_int8, {"x": plain["x"]}, steps),
    ]


def _run_project(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.project(**inputs, eps=EPS, backend=backend),)


def _run_swiglu(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.project(**inputs, eps=EPS, swiglu=True, backend=backend),)


def _run_project_int8(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    weight = Int8Weight(constants["steps"], constants["scales"])
    return (ops.project(inputs["x"], weight, backend=backend),)


def _run_normed_int8(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    weight, x = Int8Weight(constants["steps"], constants["scales"]), inputs["x"]
    return (ops.project(x, weight, norm_dim=x.shape[1], eps=EPS, backend=backend),)


def _attention_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        rng = RandomInputs(length)
        inputs = {
            "q": rng.normal(BATCH, HEADS, length, DIM),
            "k": rng.normal(BATCH, KV_HEADS, length, DIM),
            "v": rng.normal(BATCH, KV_HEADS, length, DIM),
        }
        found.append(OpCase(f"{length} tokens", _run_attention, inputs))
        if length == LENGTHS[1]:
            found.append(OpCase("mask", _run_attention, inputs, {"mask": _attention_mask(length)}))
            ends = torch.arange(length).expand(BATCH, -1) < length - 3
            packed = {"real": ends, "seq_idx": packed_ids(length)}
            for name, constants in (("padded", {"real": padding_mask(length)}), ("packed", packed)):
                found.append(OpCase(name, _run_varlen_attention, inputs, constants))
    return found


def _attention_mask(length: int) -> Tensor:
    """(B, 1, T, T): causal, without padding keys; a padding query attends to itself."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal & (padding_mask(length)[:, None, None, :] | torch.eye(length, dtype=torch.bool))


def _run_attention(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    mask = constants.get("mask")
    return (ops.attention(**inputs, mask=mask, is_causal=mask is None, backend=backend),)


def _run_varlen_attention(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    varlen = varlen_metadata(constants["real"], constants.get("seq_idx"))
    y = ops.attention(**inputs, varlen=varlen, backend=backend)
    # The output at padding is undefined.
    return (y.where(constants["real"][:, None, :, None], 0),)
