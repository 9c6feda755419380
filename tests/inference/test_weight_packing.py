"""Packed weights are the model's own; int8 weights equal a model with rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import distance, pad_batch, prompt, small_model
from torch import nn

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.inference import Generator, Int8Linear, pack, quantize
from mmmamba_cli.inference.packed_model import pack_model
from mmmamba_cli.inference.weight_packing import mixer_inputs, mlp_inputs, packed_view
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.mixers.attention import Attention
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.ops.projection import dequantize, quantize_rows

NEW = 8


def pointers(model: Any) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def with_biases(model: Any) -> Any:
    """Add biases to q, v and the output projection, but not to k."""
    rng = torch.Generator().manual_seed(5)
    for block in model.model.blocks:
        for name in ("q_proj", "v_proj", "o_proj"):
            layer = getattr(block.mixer, name)
            layer.bias = nn.Parameter(torch.randn(layer.out_features, generator=rng))
    return model.requires_grad_(False)


@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_packing_keeps_the_forward_bit_for_bit(plan: str) -> None:
    model = small_model(plan)
    ids, pixels = prompt(2, 9)
    before = model(ids, pixels).logits
    kept = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    pack(model)
    assert torch.equal(model(ids, pixels).logits, before)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, kept[name]), name


def test_weights_are_views_of_packed_weights() -> None:
    model = small_model("am")
    size = sum(p.numel() for p in model.parameters())
    pack(model)
    groups = [mixer_inputs(block.mixer) for block in model.model.blocks]
    groups += [mlp_inputs(block.mlp) for block in model.model.blocks]
    for layers in groups:
        whole = packed_view([layer.weight for layer in layers])
        assert whole is not None
        assert torch.equal(whole, torch.cat([layer.weight for layer in layers]))
        # No second copy: a write to the packed weight is visible in the module.
        whole[-1, -1] = 123.0
        assert layers[-1].weight[-1, -1] == 123.0
        assert whole.data_ptr() == layers[0].weight.data_ptr()
        assert whole.untyped_storage().nbytes() == whole.nbytes
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(storage.nbytes() for storage in storages.values()) == 4 * size
    for layer in pack_model(model).language.layers:
        names = [layer.mixer.inputs, layer.mlp_inputs]
        assert all(place.weight.data_ptr() in pointers(model).values() for place in names)


def test_neighbours_in_two_storages_are_not_joined() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    parts = [torch.from_numpy(rows[:2]), torch.from_numpy(rows[2:])]
    assert parts[1].data_ptr() == parts[0].data_ptr() + parts[0].nbytes
    assert packed_view(parts) is None
    whole = torch.from_numpy(rows)
    assert packed_view([whole[:2], whole[2:]]) is not None


def test_packing_twice_moves_nothing() -> None:
    model = small_model("amam")
    pack(model)
    before = pointers(model)
    parameters = list(model.parameters())
    pack(model)
    Generator(model)
    assert pointers(model) == before
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_models_with_shared_weights() -> None:
    teacher, student = small_model("aaaa"), small_model("mmmm", seed=1)
    for one, other in zip(teacher.model.blocks, student.model.blocks, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(other.mixer, name).weight = getattr(one.mixer, name).weight
        other.mlp = one.mlp
    ids, _ = prompt(0, 6)
    expected = [
        m.generate(ids, max_new_tokens=NEW, do_sample=False)[:, 6:] for m in (teacher, student)
    ]
    # Attention and Mamba-2 pack q, k and v in different orders; a new generator packs them again.
    made = [Generator(teacher), Generator(student), Generator(teacher)]
    for generator, tokens in zip(made, (*expected, expected[0]), strict=True):
        assert torch.equal(generator.generate(ids, max_new_tokens=NEW), tokens)
    shared = [
        pack_model(m).language.layers[0].mlp_inputs.weight.data_ptr() for m in (teacher, student)
    ]
    assert shared[0] == shared[1]


def test_cast_weights_are_packed_again() -> None:
    model = small_model("amam")
    pack(model)
    ids, _ = prompt(0, 6)
    model.double()
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(Generator(model).generate(ids, max_new_tokens=NEW), expected)


@pytest.mark.parametrize("plan", ["aaaa", "mmmm"])
def test_projections_with_and_without_bias(plan: str) -> None:
    model = with_biases(small_model(plan))
    ids, mask = pad_batch([prompt(0, 9)[0], prompt(0, 5, 1)[0]])
    inputs = {"attention_mask": mask}
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, **inputs)[:, 9:]
    found = Generator(model).generate(ids, **inputs, max_new_tokens=NEW)
    assert torch.equal(found, expected)
    for block in model.model.blocks:
        block.mixer.q_proj.bias.add_(1.0)
    assert not torch.equal(Generator(model).generate(ids, **inputs, max_new_tokens=NEW), expected)


def test_a_packed_model_saves_the_same_tensors(tmp_path: Path) -> None:
    model = small_model("amam")
    kept = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    pack(model)
    model.save_pretrained(tmp_path)
    again = HolisticVLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


class Adapted(nn.Linear):
    """A stand-in for a low-rank adapter."""


def test_adapters_are_refused_and_the_model_is_unchanged() -> None:
    model = small_model("amam")
    model.model.layers[2].mixer.o_proj = Adapted(32, 32, bias=False)
    before = pointers(model)
    for work in (pack, quantize, Generator):
        with pytest.raises(MmmambaError, match=r"model.layers.2.mixer.o_proj is a Adapted.*merge"):
            work(model)
    assert pointers(model) == before


def test_mixed_dtypes_are_refused_and_the_model_is_unchanged() -> None:
    model = small_model("amam")
    model.model.layers[3].mixer.g_proj.bfloat16()
    before = pointers(model)
    with pytest.raises(MmmambaError, match=r"layers.3.mixer.g_proj is torch.bfloat16.*v_proj"):
        pack(model)
    assert pointers(model) == before


def readers(model: Any) -> list[tuple[nn.Module, RMSNorm | None]]:
    """Each layer that is quantized, with the norm in front of it."""
    found: list[tuple[nn.Module, RMSNorm | None]] = [(model.lm_head, model.model.norm)]
    for block in model.model.blocks:
        mixer, mlp = block.mixer, block.mlp
        found += [(layer, block.mixer_norm) for layer in mixer_inputs(mixer)]
        found += [(layer, block.mlp_norm) for layer in mlp_inputs(mlp)]
        found += [(mixer.o_proj, getattr(mixer, "g_norm", None)), (mlp.down_proj, None)]
    return found


def folded(layer: nn.Module, norm: RMSNorm | None) -> torch.Tensor:
    """The layer's weight with the norm's weight multiplied into its columns."""
    if norm is None:
        return layer.weight
    repeats = layer.in_features // len(norm.weight)
    return layer.weight * torch.cat([norm.weight] * repeats)


def rounded(model: Any) -> Any:
    """The model with folded norms and weights rounded to int8, in its own dtype."""
    found = readers(model)
    for layer, norm in found:
        layer.weight.copy_(dequantize(quantize_rows(folded(layer, norm)), layer.weight.dtype))
    for _, norm in found:
        if norm is not None:
            norm.weight.fill_(1)
    return model


def with_head_norms(model: Any) -> Any:
    """Add QK norms to the attention layers."""
    rng = torch.Generator().manual_seed(6)
    for mixer in (block.mixer for block in model.model.blocks):
        if isinstance(mixer, Attention):
            mixer.q_norm, mixer.k_norm = RMSNorm(8, 1e-5), RMSNorm(8, 1e-5)
            for norm in (mixer.q_norm, mixer.k_norm):
                norm.weight.data += 0.5 * torch.randn(8, generator=rng)
    return model.requires_grad_(False)


@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_int8_equals_a_model_with_rounded_weights(plan: str) -> None:
    ids, mask = pad_batch([prompt(0, 9)[0], prompt(0, 5, 1)[0]])
    expected = rounded(with_biases(small_model(plan))).double()
    model = with_biases(small_model(plan))
    plain = model(ids, attention_mask=mask).logits
    quantize(model)
    logits = model(ids, attention_mask=mask).logits
    assert distance(logits, expected(ids, attention_mask=mask).logits) < 1e-4
    assert 1e-3 < distance(logits, plain) < 0.3
    # The generator and the modules read the same weights.
    generator = Generator(model)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    found = generator.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(found, tokens[:, 9:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_norms_are_folded_into_int8_weights(plan: str, dtype: torch.dtype) -> None:
    model = with_head_norms(small_model(plan, qk_norm=plan == "amam")).to(dtype)
    expected = [folded(layer, norm).double() for layer, norm in readers(model)]
    heads = {n: p.clone() for n, p in model.named_parameters() if ".q_norm" in n or ".k_norm" in n}
    assert len(heads) == 2 * plan.count("a") + 2 * plan.count("m") * (plan == "amam")
    held = [p for n, p in model.named_parameters() if "norm" in n]
    kept = [p.clone() for p in held]
    quantize(model)
    for (layer, norm), wanted in zip(readers(model), expected, strict=True):
        found = dequantize(layer.as_weight(), torch.float64)
        half = 0.5 * layer.scales.double().unsqueeze(1)
        assert ((found - wanted).abs() <= 1.0001 * half).all()
        assert norm is None or torch.equal(norm.weight, torch.ones_like(norm.weight))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in heads.items())
    # Other references to the old norm weights are unchanged.
    assert all(torch.equal(old, copy) for old, copy in zip(held, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_int8_with_folded_norms_approximates_the_model(dtype: torch.dtype) -> None:
    ids, mask = pad_batch([prompt(0, 9)[0], prompt(0, 5, 1)[0]])
    for plan in ("aaaa", "mmmm", "amam"):
        model = with_head_norms(small_model(plan, qk_norm=plan == "amam")).to(dtype)
        plain = model(ids, attention_mask=mask).logits
        quantize(model)
        logits = model(ids, attention_mask=mask).logits
        assert 1e-3 < distance(logits[mask.bool()], plain[mask.bool()]) < 0.3, plan
        generator = Generator(model)
        found = generator.prefill(ids[:, :-1], attention_mask=mask[:, :-1])
        assert distance(found, logits[:, -2]) < 1e-5
        assert distance(generator.step(ids[:, -1:]), logits[:, -1]) < 1e-5


def test_an_int8_step_reads_no_norm_weight() -> None:
    model = small_model("am")
    assert pack_model(model).head.options["norm"] is not None
    quantize(model)
    packed = pack_model(model)
    (attention,), (mamba2,) = (stack.layers for stack in packed.stacks)
    projections = [packed.head]
    for layer in (attention, mamba2):
        projections += [layer.mixer.inputs, layer.mlp_inputs]
    projections.append(mamba2.mixer.output)
    norms = [(one.options["norm"], one.options["norm_dim"]) for one in projections]
    assert norms == [(None, 32)] * 5 + [(None, 8)]
    # A norm that was changed after `quantize` is read.
    model.model.layers[1].mixer_norm.weight.fill_(2)
    ids, _ = prompt(0, 6)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[:, 6:]
    assert pack_model(model).language.layers[0].mixer.inputs.options["norm"] is not None
    assert torch.equal(Generator(model).generate(ids, max_new_tokens=NEW), expected)


def test_quantizing_twice_changes_nothing() -> None:
    model = small_model("amam")
    quantize(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize(model)
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in kept)


def test_a_tied_head_is_quantized_without_the_embedding() -> None:
    model = small_model("mmmm")
    model.lm_head.weight = model.model.text_embedding.weight
    ids, _ = prompt(0, 9)
    kept, plain = model.model.text_embedding.weight.clone(), model(ids).logits
    quantize(model)
    assert torch.equal(model.model.text_embedding.weight, kept)
    assert 1e-3 < distance(model(ids).logits, plain) < 0.1


def test_shared_norms_of_another_model_are_unchanged() -> None:
    teacher, student = small_model("aaaa"), small_model("mmmm", seed=1)
    for one, other in zip(teacher.model.blocks, student.model.blocks, strict=True):
        other.mixer_norm.weight, other.mlp_norm.weight = one.mixer_norm.weight, one.mlp_norm.weight
    ids, _ = prompt(0, 6)
    before = teacher(ids).logits
    early = Generator(student)
    early.prefill(ids)
    expected = early.step(ids[:, :1]).clone()
    quantize(student)
    assert torch.equal(teacher(ids).logits, before)
    # An earlier generator still holds its weights.
    early.prefill(ids)
    assert torch.equal(early.step(ids[:, :1]), expected)


def test_quantize_frees_the_weights() -> None:
    model = small_model("amam")
    before = Generator(model).weight_bytes
    gone = [model.lm_head.weight, model.model.layers[1].mlp.up_proj.weight]
    quantize(model)
    # Only the projections of the vision part are still plain linear layers.
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == ["model.vision.projector.0", "model.vision.projector.2"]
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == 2 * 7 + 2 * 9 + 1
    held = set(pointers(model).values())
    assert all(weight.data_ptr() not in held for weight in gone)
    after = Generator(model).weight_bytes
    # One byte instead of four per weight, and a scale of four bytes per row.
    assert before / 4 < after < before / 2.5
    heads = model.lm_head
    quantize(model)
    assert model.lm_head is heads and Generator(model).weight_bytes == after


def test_int8_groups_share_one_packed_weight() -> None:
    model = small_model("am")
    quantize(model)
    values = [layer.values for layer in mixer_inputs(model.model.layers[1].mixer)]
    assert packed_view(values) is not None
    weight = pack_model(model).language.layers[0].mixer.inputs.weight
    assert weight.values.data_ptr() == values[0].data_ptr()
    ids, _ = prompt(0, 6)
    expected = Generator(model).generate(ids, max_new_tokens=NEW)
    # Move each buffer separately, as `model.to` does.
    for layer in mixer_inputs(model.model.layers[1].mixer):
        layer.values, layer.scales = layer.values.clone(), layer.scales.clone()
    assert torch.equal(Generator(model).generate(ids, max_new_tokens=NEW), expected)
