"""Arguments that transformers, Trainer and peft pass to a model's forward, and its outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import IMAGE_ID, distance, pad_batch, prompt, small_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmmamba_cli import ops
from mmmamba_cli.errors import DataError
from mmmamba_cli.model import HolisticVLM, decoder, new_cache
from mmmamba_cli.model.cache import CACHE_NAME

IDS = torch.arange(2, 22)[None]
PLANS = ["aaaa", "amam", "mmmm"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shuffle", ["pre", "post"])
@torch.no_grad()
def test_hidden_states_equal_those_of_a_layer_loop(plan: str, shuffle: str) -> None:
    model = small_model(plan, shuffle)
    ids, pixels = prompt(1, 9)
    out = model(ids, pixels, output_hidden_states=True)
    seen = model.model.prepare(ids, pixels)
    hidden = model.model.embed(seen)
    expected = [hidden]
    for index, block in enumerate(model.model.blocks):
        if index == 2:
            hidden = model.model.embedding_to_language(hidden, seen)
        hidden = block(hidden, seen.embedding_layout if index < 2 else seen.language_layout)
        expected.append(hidden)
    expected[-1] = model.model.norm(hidden)
    assert len(out.hidden_states) == len(plan) + 1
    for found, wanted in zip(out.hidden_states, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    columns = ids.shape[1] if shuffle == "pre" else ids.shape[1] + 12
    assert out.hidden_states[0].shape == out.hidden_states[2].shape == (1, columns, 32)
    assert out.hidden_states[3].shape == (1, ids.shape[1], 32)
    model, pixels = model.double(), pixels.double()
    whole, chunked = (
        model(ids, pixels, output_hidden_states=True, prefill_chunk_size=size).hidden_states
        for size in (None, 5)
    )
    for found, wanted in zip(chunked, whole, strict=True):
        assert distance(found, wanted) < 1e-12
    assert model(ids, pixels).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids, pixels).hidden_states) == len(plan) + 1


@torch.no_grad()
def test_generate_returns_hidden_states_of_every_step() -> None:
    model = small_model()
    made = model.generate(
        IDS, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [step[0].shape[1] for step in made.hidden_states] == [20, 1, 1]
    assert all(len(step) == 5 for step in made.hidden_states)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_inputs_embeds_equal_input_ids(plan: str) -> None:
    model = small_model(plan)
    ids, pixels = prompt(2, 9)
    for given, tiles in ((IDS, None), (ids, pixels)):
        embeds = model.get_input_embeddings()(given)
        out = model(inputs_embeds=embeds, pixel_values=tiles)
        assert torch.equal(out.logits, model(given, tiles).logits)
        made = model.generate(inputs_embeds=embeds, pixel_values=tiles, max_new_tokens=5)
        assert torch.equal(
            made, model.generate(given, pixel_values=tiles, max_new_tokens=5)[:, given.shape[1] :]
        )
        beams = {"pixel_values": tiles, "max_new_tokens": 4, "num_beams": 2}
        made = model.generate(inputs_embeds=embeds, **beams)
        assert torch.equal(made, model.generate(given, **beams)[:, given.shape[1] :])


def test_inputs_embeds_with_images_and_post_are_refused() -> None:
    model = small_model("amam", "post")
    ids, pixels = prompt(1, 9)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(DataError, match="inputs_embeds cannot hold pictures"):
        model(inputs_embeds=embeds, pixel_values=pixels)
    text = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=text).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="give one of input_ids and inputs_embeds"):
        model(IDS, inputs_embeds=text)
    with pytest.raises(ValueError, match="give one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(DataError, match=r"inputs_embeds is \(1, 0, 32\)"):
        model(inputs_embeds=text[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 20, 20\)"):
        model(IDS, attention_mask=torch.ones(1, 1, 20, 20))


@torch.no_grad()
def test_position_ids_are_used() -> None:
    model = small_model("aaaa")
    expected = model(IDS).logits
    counted = torch.arange(20)[None]
    assert torch.equal(model(IDS, position_ids=counted).logits, expected)
    # RoPE is relative: a common offset changes nothing, a gap does.
    assert distance(model(IDS, position_ids=counted + 5).logits, expected) < 1e-4
    mask, gap = torch.ones_like(IDS), counted + 3 * (counted > 9)
    assert distance(model(IDS, position_ids=gap, attention_mask=mask).logits, expected) > 1e-3
    # A padded row with positions as written by collators.
    ids, mask = pad_batch([IDS, IDS[:, :13]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits[1, 7:]
    assert distance(padded, model(IDS[:, :13]).logits[0]) < 1e-5
    # Decoding continues from the last position.
    cache = new_cache(model.config)
    model(IDS[:, :12], position_ids=counted[:, :12] + 7, past_key_values=cache)
    rest = model(IDS[:, 12:], past_key_values=cache).logits
    assert distance(rest, expected[:, 12:]) < 1e-4


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_positions_that_restart_mark_packed_sequences(plan: str) -> None:
    model = small_model(plan)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = model(IDS, position_ids=positions).logits
    alone = torch.cat((model(IDS[:, :8]).logits, model(IDS[:, 8:]).logits), dim=1)
    assert distance(packed, alone) < 1e-5
    by_name = model(IDS, seq_idx=(torch.arange(20) >= 8).long()[None]).logits
    assert torch.equal(packed, by_name)


def test_position_ids_with_images_and_post() -> None:
    model = small_model("amam", "post")
    ids, pixels = prompt(1, 9)
    counted = torch.arange(ids.shape[1])[None]
    assert torch.equal(model(ids, pixels, position_ids=counted).logits, model(ids, pixels).logits)
    with pytest.raises(DataError, match="position_ids other than the number of each token"):
        model(ids, pixels, attention_mask=torch.ones_like(ids), position_ids=counted + 1)


def test_both_names_of_the_cache() -> None:
    model = small_model()
    expected = model(IDS).logits
    for name in ("past_key_values", "cache"):
        cache = new_cache(model.config)
        out = model(IDS[:, :12], **{name: cache})
        assert out[CACHE_NAME].decoding_state is cache.decoding_state
        assert distance(model(IDS[:, 12:], **{name: cache}).logits, expected[:, 12:]) < 1e-5
        made = model.generate(IDS, **{name: new_cache(model.config)}, max_new_tokens=4)
        assert torch.equal(made, model.generate(IDS, max_new_tokens=4))
        inputs = model.prepare_inputs_for_generation(IDS, **{name: new_cache(model.config)})
        assert CACHE_NAME in inputs
    with pytest.raises(ValueError, match="two names of one argument"):
        model(IDS, past_key_values=new_cache(model.config), cache=new_cache(model.config))


def test_tuples_with_return_dict_false() -> None:
    model = small_model()
    logits = model(IDS).logits
    found = model(IDS, return_dict=False)
    assert isinstance(found, tuple) and torch.equal(found[0], logits)
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)
    assert torch.equal(model(IDS, return_dict=True).logits, logits)


def test_unknown_arguments_are_ignored_as_in_transformers() -> None:
    model = small_model()
    out = model(IDS, token_type_ids=None, cache_position=torch.arange(20), output_router_logits=1)
    assert torch.equal(out.logits, model(IDS).logits)


def test_the_loss_is_divided_by_num_items_in_batch() -> None:
    model = small_model()
    labels = IDS.clone()
    labels[:, :5] = -100
    logits = model(IDS).logits
    total = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    assert torch.allclose(model(IDS, labels=labels).loss, total / 15)
    for items in (40, torch.tensor(40)):
        assert torch.allclose(model(IDS, labels=labels, num_items_in_batch=items).loss, total / 40)
    shifted = torch.cat((labels[:, 1:], torch.full((1, 1), -100)), dim=1)
    assert torch.allclose(model(IDS, labels=labels, shift_labels=shifted).loss, total / 15)


def test_gradient_accumulation_equals_one_batch() -> None:
    """Micro batches of different lengths, summed as by Trainer, equal the whole batch."""
    model = small_model().requires_grad_(True)
    ids, mask = pad_batch([IDS, IDS[:, 3:9]], side="right")
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for row in range(2):
        part = slice(row, row + 1)
        model(
            ids[part],
            attention_mask=mask[part],
            labels=labels[part],
            num_items_in_batch=count,
        ).loss.backward()
    for name, p in model.named_parameters():
        if name in whole and whole[name].norm() > 0:
            assert distance(p.grad, whole[name]) < 1e-4, name


def test_ignored_labels_give_a_zero_loss_with_a_graph() -> None:
    model = small_model().requires_grad_(True)
    for extra in ({}, {"num_items_in_batch": torch.tensor(0)}):
        loss = model(IDS, labels=torch.full_like(IDS, -100), **extra).loss
        assert loss.item() == 0
        loss.backward()
    assert not model.lm_head.weight.grad.any()


@pytest.mark.parametrize("plan", ["aaaa", "amam"])
def test_eager_attention_returns_its_weights(plan: str) -> None:
    model = small_model(plan)
    ids, mask = pad_batch([IDS, IDS[:, :13]])
    fused = model(ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    out = model(ids, attention_mask=mask, output_attentions=True)
    assert distance(out.logits[mask.bool()], fused.logits[mask.bool()]) < 1e-5
    layers = [i for i, letter in enumerate(plan) if letter == "a"]
    assert len(out.attentions) == len(layers)
    seen = model.model.prepare(ids, attention_mask=mask)
    hidden, found = model.model.embed(seen), iter(out.attentions)
    for index, block in enumerate(model.model.blocks):
        columns = seen.embedding_layout if index < 2 else seen.language_layout
        if index in layers:
            expected = block.mixer.mixing_matrix(block.mixer_norm(hidden), columns)
            assert distance(next(found), expected) < 1e-5
        hidden = block(hidden, columns)
    step = model(IDS[:, :1], past_key_values=model(IDS).past_key_values, output_attentions=True)
    assert step.attentions[0].shape == (1, 4, 1, 21)
    with pytest.raises(ValueError, match="output_attentions and prefill_chunk_size"):
        model(IDS, output_attentions=True, prefill_chunk_size=4)


@pytest.mark.parametrize(("name", "backend"), [("eager", "reference"), ("sdpa", "auto")])
def test_the_requested_attention_implementation_runs(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["backend"])
        return ops.attention(*args, **kwargs)

    monkeypatch.setattr("mmmamba_cli.model.softmax_mixer.attention", noted)
    model = small_model()
    model.set_attn_implementation(name)
    model(IDS)
    assert asked == [backend] * 2


def test_fused_attention_warns_that_it_returns_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(decoder.logger, "warning_once", said.append)
    assert small_model()(IDS, output_attentions=True).attentions is None
    (text,) = said
    assert "attn_implementation='sdpa'" in text and 'attn_implementation="eager"' in text


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_unsupported_attention_is_refused(name: str) -> None:
    config = small_model().config
    with pytest.raises((ValueError, ImportError)):
        HolisticVLM._from_config(config, attn_implementation=name)


def test_checkpointing_uses_the_function_of_transformers() -> None:
    model = small_model().requires_grad_(True).train()
    plain = model(IDS, labels=IDS)
    plain.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    calls = []

    def counted(function: Any, *args: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=True)

    model._set_gradient_checkpointing(True, counted)
    model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 4
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.equal(p.grad, expected[name]), name
    with pytest.raises(ValueError, match="runs layers twice"):
        model(IDS, past_key_values=new_cache(model.config))
    with torch.no_grad():
        assert model.generate(IDS, max_new_tokens=3).shape == (1, 23)
    model._set_gradient_checkpointing(False)
    calls.clear()
    model(IDS, labels=IDS).loss.backward()
    assert not calls


def test_gradient_checkpointing_enable_takes_its_options() -> None:
    model = small_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    block = model.model.blocks[0]
    assert block.gradient_checkpointing
    assert block._gradient_checkpointing_func.keywords == {"use_reentrant": False}


CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "within another module": lambda model: nn.ModuleList([model]).bfloat16()[0],
    "of the base model": lambda model: model.model.bfloat16() and model,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_leaves_small_parameters_in_fp32(cast: Any) -> None:
    options = {"d_skip": True, "qk_norm": True, "tile_taps": True, "sink_logits": True}
    model = small_model("amdkgw", **options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    cast(model)
    kept = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    small = (".A_log", ".dt_bias", ".D", ".beta_bias", ".decay_bias", ".tile_taps", ".sink_logits")
    expected = [name for name in before if name.endswith(small) or "norm.weight" in name]
    assert [name for name in kept if not name.startswith("lm_head")] == expected
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.equal(p, before[name]), name
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    model.bfloat16()
    assert model.model.blocks[1].mixer.A_log.dtype == torch.float32


@pytest.mark.parametrize("plan", ["am", "dkgw"])
def test_one_graph_without_a_cache(plan: str) -> None:
    model = small_model(plan, "post")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    padded = {"attention_mask": mask}
    # Positions and no inputs but ids reach no mixer otherwise than in the first plan.
    every = ({}, padded, {"position_ids": torch.arange(20)[None]})
    with torch.no_grad():
        for extra in every if plan == "am" else (padded,):
            found = compiled(IDS, use_cache=False, **extra).logits
            assert distance(found, model(IDS, use_cache=False, **extra).logits) < 1e-5
    model.requires_grad_(True)
    loss = compiled(IDS, use_cache=False, labels=IDS).loss
    loss.backward()
    assert distance(loss.detach(), model(IDS, labels=IDS).loss.detach()) < 1e-5
    assert model.model.blocks[0].mixer.q_proj.weight.grad.any()


def test_context_ids_without_pixels_are_refused() -> None:
    """They are counted outside of compiled graphs; a single `IMAGE_ID` may be typed."""
    model = small_model()
    with pytest.raises(DataError, match="no pixel_values were given"):
        model(torch.full((1, 9), IMAGE_ID))
