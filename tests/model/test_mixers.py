"""Every mixer: the equalities, its mixing matrix, its parameters and the memory of its states."""

from __future__ import annotations

import pkgutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import MIXERS, distance, join_pixels, pad_batch, prompt, small_model
from torch import Tensor, nn

from mmmamba_cli.architecture import (
    MixerConfig,
    cache_bytes,
    mixer_specs,
    parameter_shapes,
)
from mmmamba_cli.checkpoint.native_config import to_architecture
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.inference import Generator
from mmmamba_cli.inference import mixers as packed_mixers
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig, new_cache
from mmmamba_cli.model.mixer import query_key_products

CLOSE = 1e-10
# Plans and options; in the mixed ones a teacher's attention stands beside two mixers.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_delta": ("dddd", {}),
    "gated_delta, norm, RoPE": ("dadd", {"qk_norm": True, "rope": True, "conv_width": 4}),
    "kda": ("kakk", {}),
    "simple GLA": ("mamm", {"input_step": False, "d_skip": True}),
    "gla": ("ggag", {}),
    "mixed": ("dkma", {}),
    "window": ("wwww", {"window": 5}),
    "window, first columns": ("wawm", {"window": 4, "sinks": 2}),
    "window, sink logits": ("wwdw", {"window": 5, "sinks": 1, "sink_logits": True}),
    "window wider than the text": ("waww", {"window": 200, "sinks": 3}),
}
cases = pytest.mark.parametrize("case", CASES)


def fp64_model(case: str, shuffle: str = "post") -> HolisticVLM:
    plan, options = CASES[case]
    model: HolisticVLM = small_model(plan, shuffle, **options).double()
    assert model.config.mixer_names == tuple(MIXERS[letter] for letter in plan)
    return model


def inputs_of_rows(*rows: tuple[int, int]) -> list[tuple[Tensor, Tensor | None]]:
    made = [prompt(*row, seed=number) for number, row in enumerate(rows)]
    return [(ids, None if pixels is None else pixels.double()) for ids, pixels in made]


def test_every_mixer_is_tested() -> None:
    letters = {letter for plan, _ in CASES.values() for letter in plan}
    assert {MIXERS[letter] for letter in letters} == set(mixer_specs())


def test_a_mixer_has_fast_decoding_where_it_has_a_packed_step() -> None:
    steps = {module.name for module in pkgutil.iter_modules(packed_mixers.__path__)}
    assert steps == {n for n, spec in mixer_specs().items() if spec.is_packed(MixerConfig())}


@cases
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_batch_equals_the_row_alone(case: str, side: str) -> None:
    model = fp64_model(case)
    inputs = inputs_of_rows((2, 5), (0, 9), (1, 3))
    ids, mask = pad_batch([row for row, _ in inputs], side)
    together = model(ids, join_pixels([p for _, p in inputs]), mask).logits
    for i, (row, pixels) in enumerate(inputs):
        alone = model(row, pixels).logits
        assert distance(together[i][mask[i].bool()], alone[0]) < CLOSE


@cases
def test_packed_sequences_equal_separate_ones(case: str) -> None:
    model = fp64_model(case, "pre")
    inputs = inputs_of_rows((1, 5), (0, 9), (2, 3))
    ids = torch.cat([row for row, _ in inputs], dim=1)
    seq_idx = torch.cat([torch.full_like(row, i) for i, (row, _) in enumerate(inputs)], dim=1)
    packed = model(ids, join_pixels([p for _, p in inputs]), seq_idx=seq_idx).logits
    for i, (row, pixels) in enumerate(inputs):
        assert distance(packed[0][seq_idx[0] == i], model(row, pixels).logits[0]) < CLOSE


@cases
@pytest.mark.parametrize("static", [False, True])
def test_prefill_in_chunks_and_decoding_equal_the_full_forward(case: str, static: bool) -> None:
    model = fp64_model(case)
    inputs = inputs_of_rows((2, 5), (0, 9), (1, 4))
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    more = torch.randint(2, 80, (3, 6), generator=torch.Generator().manual_seed(5))
    full_mask = torch.cat((mask, torch.ones_like(more)), 1)
    full = model(torch.cat((ids, more), 1), pixels, full_mask).logits
    width = ids.shape[1]
    cache = new_cache(model.config, max_length=width + 6 if static else None)
    parts = [model(ids, pixels, mask, past_key_values=cache, prefill_chunk_size=5).logits]
    for i in range(6):
        seen = full_mask[:, : width + i + 1]
        step = model(more[:, i : i + 1], attention_mask=seen, past_key_values=cache)
        parts.append(step.logits)
    real = full_mask.bool()
    assert distance(torch.cat(parts, 1)[real], full[real]) < CLOSE


@cases
def test_decoding_after_right_padding_equals_the_rows_alone(case: str) -> None:
    model = fp64_model(case)
    inputs = inputs_of_rows((1, 7), (0, 5))
    ids, mask = pad_batch([row for row, _ in inputs], "right")
    more = torch.randint(2, 80, (2, 4), generator=torch.Generator().manual_seed(5))
    cache = new_cache(model.config)
    model(ids, join_pixels([p for _, p in inputs]), mask, past_key_values=cache)
    for i in range(4):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
        step = model(more[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits
    for i, (row, pixels) in enumerate(inputs):
        alone = model(torch.cat((row, more[i : i + 1]), 1), pixels).logits
        assert distance(step[i, 0], alone[0, -1]) < CLOSE


@cases
def test_the_mixing_matrix_maps_values_to_read_outs(case: str) -> None:
    """`mix` is linear in the values: its change for changed values is the matrix times theirs."""
    model = fp64_model(case, "pre")
    inputs = inputs_of_rows((0, 9), (0, 6))
    ids, mask = pad_batch([row for row, _ in inputs], "left")
    decoder = model.model
    layout = decoder.prepare(ids, attention_mask=mask).language_layout
    hidden = decoder.text_embedding(ids)
    for block in decoder.blocks[2:]:
        mixer = block.mixer
        if hasattr(mixer, "scan"):
            v, k, q, _ = mixer.values_keys_queries(hidden, layout)
            y = mixer.scan(v, k, q, hidden, layout, None)[0]
            y0 = mixer.scan(torch.zeros_like(v), k, q, hidden, layout, None)[0]
            skip = 0 if getattr(mixer, "D", None) is None else mixer.D.unsqueeze(-1)
            v = v.repeat_interleave(2, dim=2)
            expected = torch.einsum("bhts,bshp->bthp", mixer.mixing_matrix(hidden, layout), v)
            actual = y - y0 - skip * v
        else:
            v = mixer.queries_keys_values(hidden, layout)[2].repeat_interleave(2, dim=2)
            expected = torch.einsum("bhts,bshp->bthp", mixer.mixing_matrix(hidden, layout), v)
            actual = mixer.mix(hidden, layout).unflatten(-1, (4, -1))
        real = mask.bool()
        assert distance(actual[real], expected[real]) < CLOSE


@cases
def test_parameters_and_states_are_as_the_spec_says(case: str) -> None:
    model = fp64_model(case, "pre").float()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert list(parameter_shapes(model.config).items()) == list(shapes.items())
    cache = new_cache(model.config)
    ids, pixels = prompt(1, 8)
    model(ids, pixels, past_key_values=cache)
    held = 0
    for layer in cache.layers:
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            tensors += getattr(layer, name, {}).values()
        held += sum(t.nbytes for t in tensors if t is not None)
    expected = cache_bytes(model.config, 1, ids.shape[1], 4)
    assert held == expected.kv_cache + expected.conv_state + expected.ssm_state


@cases
def test_every_parameter_gets_a_gradient(case: str) -> None:
    model = fp64_model(case)
    model.requires_grad_(True)
    ids, pixels = inputs_of_rows((1, 6))[0]
    model(ids, pixels, use_cache=False).logits.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@cases
def test_beams_follow_their_rows(case: str) -> None:
    model = fp64_model(case)
    ids, pixels = inputs_of_rows((1, 6))[0]
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": 79}
    kept = model.generate(ids, pixel_values=pixels, **options)
    again = model.generate(ids, pixel_values=pixels, use_cache=False, **options)
    assert torch.equal(kept, again)


@cases
def test_the_config_survives_its_json(case: str) -> None:
    config = fp64_model(case).config
    raw = config.to_dict()
    assert HolisticVLMConfig.from_dict(raw).mixer_names == config.mixer_names
    found = to_architecture(raw, "config.json")
    assert found.mixer_names == config.mixer_names
    assert parameter_shapes(found) == parameter_shapes(config)


@cases
def test_the_generator_decodes_or_says_which_mixer_it_does_not(case: str) -> None:
    model = fp64_model(case, "post").float()
    specs = {name: mixer_specs()[name] for name in model.config.mixer_names}
    unpacked = [s.title for s in specs.values() if not s.is_packed(model.config.mixer_config)]
    if unpacked:
        with pytest.raises(MmmambaError, match=unpacked[0]):
            Generator(model)
        return
    generator, options = Generator(model), {"max_new_tokens": 12}
    for seed in range(10):
        ids, pixels = prompt(seed % 3, 4 + seed, seed)
        expected = model.generate(ids, pixel_values=pixels, do_sample=False, **options)
        actual = generator.generate(ids, pixels, **options)
        assert torch.equal(actual, expected[:, -actual.shape[1] :])


def test_simple_gla_without_decay_is_linear_attention() -> None:
    """Steps that underflow in fp32 give finite gradients."""
    model = small_model("mm", input_step=False)
    mixer = model.model.blocks[0].mixer.requires_grad_(True)
    ids, _ = prompt(0, 20)
    layout = model.model.prepare(ids).language_layout
    hidden = model.model.text_embedding(ids)
    for logit in (-30.0, -60.0, -200.0):
        mixer.dt_bias.data.fill_(logit)
        v, k, q, _ = mixer.values_keys_queries(hidden, layout)
        y, _ = mixer.scan(v, k, q, hidden, layout, None)
        values = v.repeat_interleave(2, dim=2)
        products = query_key_products(q, k).tril() / 8**0.5
        expected = torch.einsum("bhts,bshp->bthp", products, values)
        assert distance(y.detach(), expected.detach()) < 1e-5
        y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)
    assert mixer.dt_bias.grad is not None


@pytest.mark.parametrize("case", [*CASES, "taps in tiles"])
def test_autocast_rounds_projections_only(case: str) -> None:
    """Decays, write strengths, scans and mixing matrices, and their gradients, are those of fp32.

    Bit for bit, given the same rounded projections.
    """
    taps = {"tile_taps": True, "tile_layers": "all", "rope": True}
    plan, options = CASES.get(case, ("mdkg", taps))
    model = small_model(plan, "pre", **options).requires_grad_(True)
    inputs = inputs_of_rows((1, 9), (0, 6))
    ids, mask = pad_batch([row for row, _ in inputs], "left")
    pixels = join_pixels([p for _, p in inputs])
    layout = model.model.prepare(ids, pixels.float(), mask).language_layout
    assert (layout.tiles is None) == (case in CASES)
    hidden = model.model.text_embedding(ids).detach()

    def results(rounded: bool) -> list[Tensor | None]:
        model.zero_grad()
        found = []
        for mixer in (block.mixer for block in model.model.blocks):
            # Attention and windows mix in bf16.
            for method in ("mix", "mixing_matrix")[not hasattr(mixer, "scan") :]:
                # Autocast keeps a bf16 copy of a weight until it exits, and its gradient in bf16.
                with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                    found.append(getattr(mixer, method)(hidden, layout))
                assert method == "mix" or found[-1].dtype == torch.float32
                found[-1].square().sum().backward()
        return [*found, *(parameter.grad for parameter in model.parameters())]

    found = results(rounded=True)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(rounded_projection, module)
    for one, other in zip(found, results(rounded=False), strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert one.dtype == other.dtype and torch.equal(one, other)


def rounded_projection(module: nn.Linear, x: Tensor) -> Tensor:
    """What autocast makes of a projection."""
    bias = None if module.bias is None else module.bias.bfloat16()
    return F.linear(x.bfloat16(), module.weight.bfloat16(), bias)
