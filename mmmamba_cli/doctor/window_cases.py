"""Test cases of sliding-window attention.

Legend: B batch, T tokens, H query heads, K key/value heads, P head dim.
"""

from __future__ import annotations

from torch import Tensor

from mmmamba_cli import ops
from mmmamba_cli.doctor.op_spec import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    OpCase,
    RandomInputs,
    Tensors,
    packed_ids,
    padding_mask,
)
from mmmamba_cli.ops.window import window_state

# Less and more than some of the lengths; sinks that a window does and does not include.
WINDOW, SINKS = 24, 3


def window_attention_cases() -> list[OpCase]:
    found = [
        OpCase(f"{length} tokens", _run_window_attention, *_window_inputs(length, length))
        for length in LENGTHS
    ]
    length = LENGTHS[1]
    inputs, past, fp32_inputs = _window_inputs(length, 5)
    for name, constants in (("mask", padding_mask), ("seq_idx", packed_ids)):
        more = {**past, name: constants(length)}
        found.append(OpCase(name, _run_window_attention, inputs, more, fp32_inputs))
    alone = {name: inputs[name] for name in ("q", "k", "v")}
    found.append(OpCase("no sink logits, no past", _run_window_attention, alone))
    return found


def _window_inputs(length: int, past: int) -> tuple[Tensors, Tensors, frozenset[str]]:
    """Inputs of `length` tokens after up to `past` others."""
    rng = RandomInputs(length)
    inputs = {
        "q": rng.normal(BATCH, HEADS, length, DIM),
        "k": rng.normal(BATCH, KV_HEADS, length, DIM),
        "v": rng.normal(BATCH, KV_HEADS, length, DIM),
        "sink_logits": rng.normal(HEADS),
    }
    k, v = rng.normal(BATCH, KV_HEADS, past, DIM), rng.normal(BATCH, KV_HEADS, past, DIM)
    keys, values, counts = window_state(k, v, window=WINDOW, sinks=SINKS, mask=padding_mask(past))
    inputs["past_keys"], inputs["past_values"] = keys, values
    return inputs, {"past_counts": counts}, frozenset({"sink_logits"})


def _run_window_attention(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (
        ops.window_attention(
            **inputs, **constants, window=WINDOW, sinks=SINKS, block_size=16, backend=backend
        ),
    )


def window_step_cases() -> list[OpCase]:
    found = []
    for length in LENGTHS:
        inputs, constants, fp32_inputs = _window_inputs(1, length)
        one = {name: inputs[name][:, :, 0] for name in ("q", "k", "v")}
        one["sink_logits"] = inputs["sink_logits"]
        one["keys"], one["values"] = inputs["past_keys"], inputs["past_values"]
        counts = {"counts": constants["past_counts"]}
        found.append(OpCase(f"after {length} tokens", _run_window_step, one, counts, fp32_inputs))
    return found


def _run_window_step(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    state = {name: inputs[name].clone() for name in ("keys", "values")}
    y = ops.window_step(**{**inputs, **state}, **constants, sinks=SINKS, backend=backend)
    return y, *state.values()


def window_matrix_cases() -> list[OpCase]:
    length = LENGTHS[1]
    inputs, _, fp32_inputs = _window_inputs(length, 1)
    given = {name: inputs[name] for name in ("q", "k", "sink_logits")}
    return [
        OpCase(name, _run_window_matrix, given, constants, fp32_inputs)
        for name, constants in (
            (f"{length} tokens", {}),
            ("mask", {"mask": padding_mask(length)}),
            ("seq_idx", {"seq_idx": packed_ids(length)}),
        )
    ]


def _run_window_matrix(inputs: Tensors, constants: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (ops.window_matrix(**inputs, **constants, window=WINDOW, sinks=SINKS, backend=backend),)
