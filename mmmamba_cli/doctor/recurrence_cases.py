"""Test cases of the delta rules and of gated linear attention.

Legend: B batch, T tokens, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

import math

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
    RandomInputs,
    Tensors,
    packed_ids,
    padding_mask,
)
from mmmamba_cli.ops.decode import DeltaWeights

FP32_INPUTS = frozenset({"log_decay", "beta", "initial_state", "state"})
# Of an op with one decay per head and of one with a decay per key channel.
PER_HEAD, PER_CHANNEL = "", ", decay per channel"


def delta_rule_cases() -> list[OpCase]:
    found = []
    for kind in (PER_HEAD, PER_CHANNEL):
        for length in LENGTHS:
            inputs = _delta_inputs(length, kind)
            name = f"{length} tokens{kind}"
            found.append(OpCase(name, _run_delta_rule, inputs, {}, FP32_INPUTS))
        inputs = _delta_inputs(LENGTHS[1], kind)
        for name, constants in (("mask", padding_mask), ("seq_idx", packed_ids)):
            given = {name: constants(LENGTHS[1])}
            found.append(OpCase(f"{name}{kind}", _run_delta_rule, inputs, given, FP32_INPUTS))
    return found


def _run_delta_rule(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.delta_rule(**inputs, **constants, qk_l2_norm=True, backend=backend)


def delta_rule_step_cases() -> list[OpCase]:
    found = []
    for kind in (PER_HEAD, PER_CHANNEL):
        inputs = _delta_inputs(1, kind)
        state = inputs.pop("initial_state")
        one = {name: value[:, 0] for name, value in inputs.items()} | {"state": state}
        found.append(OpCase(f"one token{kind}", _run_delta_rule_step, one, {}, FP32_INPUTS))
    return found


def _run_delta_rule_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.delta_rule_step(**inputs, qk_l2_norm=True, backend=backend)


def delta_rule_matrix_cases() -> list[OpCase]:
    found = []
    for kind in (PER_HEAD, PER_CHANNEL):
        inputs = _delta_inputs(LENGTHS[1], kind)
        del inputs["v"], inputs["initial_state"]
        name = f"{LENGTHS[1]} tokens{kind}"
        found.append(OpCase(name, _run_delta_rule_matrix, inputs, {}, FP32_INPUTS))
    return found


def _run_delta_rule_matrix(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.delta_rule_matrix(**inputs, qk_l2_norm=True, backend=backend),)


def gla_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        inputs = _gla_inputs(length)
        found.append(OpCase(f"{length} tokens", _run_gla, inputs, {}, FP32_INPUTS))
    inputs = _gla_inputs(LENGTHS[1])
    for name, constants in (("mask", padding_mask), ("seq_idx", packed_ids)):
        given = {name: constants(LENGTHS[1])}
        found.append(OpCase(name, _run_gla, inputs, given, FP32_INPUTS))
    return found


def _run_gla(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.gla(**inputs, **constants, backend=backend)


def gla_step_cases() -> list[OpCase]:
    inputs = _gla_inputs(1)
    state = inputs.pop("initial_state")
    one = {name: value[:, 0] for name, value in inputs.items()} | {"state": state}
    return [OpCase("one token", _run_gla_step, one, {}, FP32_INPUTS)]


def _run_gla_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return ops.gla_step(**inputs, backend=backend)


def gla_matrix_cases() -> list[OpCase]:
    inputs = _gla_inputs(LENGTHS[1])
    del inputs["v"], inputs["initial_state"]
    return [OpCase(f"{LENGTHS[1]} tokens", _run_gla_matrix, inputs, {}, FP32_INPUTS)]


def _run_gla_matrix(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.gla_matrix(**inputs, backend=backend),)


def _gla_inputs(length: int) -> Tensors:
    inputs = _delta_inputs(length, PER_CHANNEL)
    del inputs["beta"]
    return {**inputs, "k": inputs["k"] / math.sqrt(DIM)}


def _delta_inputs(length: int, kind: str) -> Tensors:
    rng = RandomInputs(length)
    channels = (DIM,) if kind == PER_CHANNEL else ()
    return {
        "v": rng.normal(BATCH, length, KV_HEADS, DIM),
        "k": rng.normal(BATCH, length, KV_HEADS, DIM),
        "q": rng.normal(BATCH, length, HEADS, DIM) * math.sqrt(DIM),
        # From decays that forget a token at once to decays that keep it for all tokens.
        "log_decay": -rng.uniform(-7, 2, BATCH, length, HEADS, *channels).exp(),
        "beta": rng.uniform(0, 1, BATCH, length, HEADS),
        "initial_state": rng.normal(BATCH, HEADS, DIM, DIM),
    }


def delta_mixer_step_cases() -> list[OpCase]:
    rng = RandomInputs(0)
    channels = (HEADS + 2 * KV_HEADS) * DIM
    inputs = {
        "vkq": rng.normal(BATCH, channels),
        "gates": rng.uniform(-5, 2, BATCH, 2 * HEADS),
        "conv_ring": rng.normal(BATCH, channels, TAPS),
        "state": rng.normal(BATCH, HEADS, DIM, DIM),
        "conv_weight": rng.normal(channels, TAPS),
        "conv_bias": rng.normal(channels),
        "A": -rng.uniform(0.05, 4, HEADS),
        "dt_bias": rng.normal(HEADS),
        "beta_bias": rng.normal(HEADS),
    }
    fp32_inputs = frozenset({"state", "A", "dt_bias", "beta_bias"})
    position = {"position": torch.tensor([6])}
    return [OpCase("one token", _run_delta_mixer_step, inputs, position, fp32_inputs)]


def _run_delta_mixer_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    # The op modifies them in place; the next backend needs the originals.
    ring, state = inputs["conv_ring"].clone(), inputs["state"].clone()
    weights = DeltaWeights(**{name: inputs[name] for name in DeltaWeights._fields})
    y = ops.delta_mixer_step(
        inputs["vkq"], inputs["gates"], ring, state, constants["position"], weights, backend=backend
    )
    return y, ring, state
