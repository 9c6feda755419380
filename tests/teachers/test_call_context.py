"""Padding, packing and recomputation reach the mixers of a student, whichever module is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_students import ALL_LINEAR, HYBRID, left_padded
from tiny_teachers import copied, prompt, student, teacher
from torch import Tensor, nn

from mmmamba_cli.errors import DataError
from mmmamba_cli.model.cache import CACHE_NAME
from mmmamba_cli.ops.attention import varlen_metadata
from mmmamba_cli.teachers import CallContext, StudentPlan, convert, mixers_of


def padded_logits(model: nn.Module, columns: int = 3) -> tuple[Tensor, Tensor]:
    """Logits of a row with padding before it, and of the row alone."""
    inputs = prompt("qwen3")
    padded = left_padded(inputs, columns)
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**padded, position_ids=positions).logits[:, columns:], model(**inputs).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mixer", ["mamba2", "window"])
def test_padding_on_either_side_changes_nothing(attention: str, mixer: str) -> None:
    model = student("qwen3", HYBRID, mixer, attention=attention)
    padded, alone = padded_logits(model)
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)
    inputs = prompt("qwen3")
    right = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in inputs.items()}
    torch.testing.assert_close(model(**right).logits[:, :-3], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layers", [HYBRID, ALL_LINEAR])
def test_packed_sequences_do_not_see_each_other(layers: tuple[int, ...] | None) -> None:
    model = student("qwen3", layers)
    first, second = torch.randint(3, 80, (1, 5)), torch.randint(3, 80, (1, 7))
    ids = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_packing_is_read_from_the_text_row_of_multimodal_positions(family: str) -> None:
    model = student(family, HYBRID)
    first, second = torch.randint(3, 80, (1, 5)), torch.randint(3, 80, (1, 7))
    ids = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(4, 1, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, rtol=0, atol=2e-5)
    # Three rows jump at pictures, so they tell nothing about packing; mixers read no positions.
    linear = student(family, ALL_LINEAR)
    jumping = torch.arange(12).expand(3, 1, -1) * 2
    assert torch.equal(
        linear(ids, position_ids=jumping, use_cache=False).logits, linear(ids).logits
    )


def test_inner_models_know_the_padding_too() -> None:
    model = student("qwen3_vl", HYBRID)
    inputs = {name: prompt("qwen3")[name] for name in ("input_ids", "attention_mask")}
    padded = left_padded(inputs, 3)
    hidden = [
        inner(**padded).last_hidden_state for inner in (model.model, model.model.language_model)
    ]
    logits = model(**padded).logits
    for states in hidden:
        torch.testing.assert_close(model.lm_head(states), logits, rtol=0, atol=2e-5)


def test_masks_that_do_not_name_columns_are_refused() -> None:
    model, ids = student("qwen3", HYBRID), prompt("qwen3")["input_ids"]
    with pytest.raises(DataError, match=r"attention_mask has shape \(1, 1, 9, 9\), expected"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9))
    cache = model(ids, use_cache=True)[CACHE_NAME]
    with pytest.raises(DataError, match="has 1 columns, but 9 are in the cache and 1 were given"):
        model(ids[:, :1], attention_mask=torch.zeros(1, 1), **{CACHE_NAME: cache})
    # The refusals leave nothing behind.
    padded, alone = padded_logits(model)
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)


def test_a_copy_of_a_student_has_its_own_calls() -> None:
    model = student("qwen3", HYBRID)
    other = copy.deepcopy(model)
    contexts = {id(mixer.context) for mixer in mixers_of(other)}
    assert len(contexts) == 1 and contexts.isdisjoint(id(one.context) for one in mixers_of(model))
    padded, alone = padded_logits(other)
    torch.testing.assert_close(padded, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_the_padding_of_their_own_call(reentrant: bool) -> None:
    model = student("qwen3", HYBRID).train()
    inputs = prompt("qwen3", rows=2)
    other = dict(inputs, attention_mask=inputs["attention_mask"].clone())
    inputs["attention_mask"][0, :4] = 0
    weights = [mixer.dt_proj.weight for mixer in mixers_of(model)]

    def gradients() -> list[Tensor]:
        """Of two calls with different padding, before either runs backward."""
        model.zero_grad()
        losses = [model(**one, use_cache=False).logits.square().mean() for one in (inputs, other)]
        sum(losses).backward()
        return [weight.grad.clone() for weight in weights]

    plain = gradients()
    assert all(float(grad.abs().max()) > 0 for grad in plain)
    # Renamed in transformers 5.23.
    older = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for one, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7)


def test_mixers_run_beside_a_teacher_with_its_own_context() -> None:
    source = teacher("qwen3")
    own = convert(copied(source), StudentPlan.of_layers(4, [1]))
    context, seen = CallContext(), {}
    detach = context.attach(source)

    def run(module: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        hidden, angles = kwargs["hidden_states"], kwargs["position_embeddings"]
        seen["mixed"] = mixer.o_proj(mixer.mix(hidden, context.layout(hidden, angles)))
        seen["hidden"] = hidden

    mixer = next(mixers_of(own))
    source.model.layers[1].self_attn.register_forward_pre_hook(run, with_kwargs=True)
    padded = left_padded(prompt("qwen3"), 3)
    source(**padded)
    beside = seen["mixed"]
    taken: list[Tensor] = []
    mixer.register_forward_hook(lambda module, args, output: taken.append(output[0]))
    own(**padded)
    torch.testing.assert_close(beside, taken[0], rtol=0, atol=2e-5)
    detach()
    source(**prompt("qwen3"))
    assert context.inputs().attention_mask is padded["attention_mask"]


def layout_of(context: CallContext, *, uses_rope: bool = True, **given: Tensor) -> Any:
    """The layout of a call of a language model with these arguments."""
    source, found = teacher("qwen3"), []

    def run(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        hidden, angles = kwargs["hidden_states"], kwargs["position_embeddings"]
        found.append(context.layout(hidden, angles, uses_rope=uses_rope))

    detach = context.attach(source)
    handle = source.model.layers[0].self_attn.register_forward_pre_hook(run, with_kwargs=True)
    source(input_ids=torch.full((2, 6), 5), use_cache=False, **given)
    handle.remove()
    detach()
    return found[0]


def test_values_of_a_call_are_read_on_the_cpu_where_they_are_known() -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    context = CallContext()
    assert layout_of(context, attention_mask=mask).precomputed_varlen is None
    context.remember(mask, mask.clone())
    known, expected = layout_of(context, attention_mask=mask), varlen_metadata(mask, None)
    assert expected is not None and torch.equal(known.mask, mask.bool())
    assert torch.equal(known.precomputed_varlen.cu_seqlens, expected.cu_seqlens)
    assert known.precomputed_varlen.max_seqlen == 6
    assert layout_of(context, uses_rope=False, attention_mask=mask).precomputed_varlen is None
    # The copy counts: with this one no column is padding.
    context.remember(mask, torch.ones_like(mask))
    assert layout_of(context, attention_mask=mask).mask is None


def test_packing_of_a_call_is_read_on_the_cpu_where_it_is_known() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    context = CallContext()
    context.remember(positions, positions.clone())
    known = layout_of(context, position_ids=positions)
    expected = varlen_metadata(None, known.seq_idx)
    assert expected is not None and known.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    assert torch.equal(known.precomputed_varlen.cu_seqlens, expected.cu_seqlens)
    context.remember(positions, torch.arange(6).expand(2, -1))
    assert layout_of(context, position_ids=positions).seq_idx is None
