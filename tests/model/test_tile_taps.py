"""Taps of the convolution inside tiles (`mixer.tile_taps`), in every mixer with a convolution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_related_files import related_cases, tensor_groups
from small import MIXERS, distance, join_pixels, pad_batch, prompt, small_model
from torch import Tensor

from mmmamba_cli.architecture import mixer_specs, parameter_shapes
from mmmamba_cli.checkpoint.native_config import to_architecture
from mmmamba_cli.data import Batch
from mmmamba_cli.distill.layer_losses import LayerInputs, MixerMSE
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import has_weight_decay
from mmmamba_cli.errors import CheckpointError, DataError, RecipeError
from mmmamba_cli.inference import Generator
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig, new_cache
from mmmamba_cli.model.mixer import mixer_class
from mmmamba_cli.model.mixers.mamba2 import Mamba2
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.model.tiles import tile_columns
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.seed import initial_value
from mmmamba_cli.seed.weight_transfer import student_config

CLOSE = 1e-10
TAPS = {"tile_taps": True, "tile_layers": "all"}
# Each mixer stands in the embedding stack of one plan and in the language stack of the other.
PLANS = ("mdkg", "kgmd")
plans = pytest.mark.parametrize("plan", PLANS)
shuffles = pytest.mark.parametrize("shuffle", ["pre", "post"])


def fp64_model(plan: str, shuffle: str) -> HolisticVLM:
    model: HolisticVLM = small_model(plan, shuffle, **TAPS).double()
    return model


def inputs_of_rows(*rows: tuple[int, int]) -> list[tuple[Tensor, Tensor | None]]:
    made = [prompt(*row, seed=number) for number, row in enumerate(rows)]
    return [(ids, None if pixels is None else pixels.double()) for ids, pixels in made]


def golden_mixer(groups: dict[str, dict[str, Tensor]]) -> Mamba2:
    """A Mamba-2 of the file's sizes with its weights; the file has no W_O, which `mix` omits."""
    weights, grid = dict(groups["weight"]), int(groups["config"]["grid"])
    heads, kv_heads, head_dim = groups["config"]["heads"].tolist()
    hidden = groups["input"]["hidden"].shape[-1]
    weights["conv1d.weight"] = weights["conv1d.weight"].unsqueeze(1)
    stack = {
        "num_layers": 1,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 4,
    }
    config = HolisticVLMConfig(
        vocab_size=4,
        hidden_size=hidden,
        layer_types=["linear_attention"] * 2,
        embedding_stack=stack,
        language_stack=stack,
        vision={
            "image_size": grid,
            "patch_size": 1,
            "num_channels": 3,
            "downsample_ratio": 1.0,
            "pixel_shuffle": "post",
            "image_token_id": 3,
        },
        mixer={"tile_taps": True, "conv_width": weights["conv1d.weight"].shape[-1]},
    )
    mixer = Mamba2(config, 0).double()
    mixer.load_state_dict({**mixer.state_dict(), **weights})
    return mixer


@related_cases("mlmamba", "tile_taps")
def test_golden_related_tile_taps(file: Path) -> None:
    """Plain fp64 loops over the definition, with taps and without."""
    groups, _ = tensor_groups(file)
    mixer, grid = golden_mixer(groups), int(groups["config"]["grid"])
    hidden, mask = groups["input"]["hidden"].requires_grad_(), groups["input"]["mask"]
    is_image = groups["input"]["is_image"]
    angles = hidden.new_zeros(*mask.shape, mixer.head_dim)
    layout = SequenceLayout(angles, angles, 0, mask=mask)
    assert relative(mixer.mix(hidden, layout)[mask], groups["output"]["mix_without"][mask]) < 1e-5
    tiles = tile_columns(is_image, int(is_image.sum()) // grid**2, grid)
    actual = mixer.mix(hidden, replace(layout, tiles=tiles))
    assert relative(actual[mask], groups["output"]["mix"][mask]) < 1e-5
    (actual * groups["input"]["cotangent"])[mask].sum().backward()
    found = {name: p.grad for name, p in mixer.named_parameters()} | {"hidden": hidden.grad}
    for name, expected in groups["grad"].items():
        gradient = found[name]
        assert gradient is not None
        assert relative(gradient.view_as(expected), expected) < 1e-4, name


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@plans
def test_taps_of_zero_leave_the_bits(plan: str, dtype: torch.dtype) -> None:
    model = small_model(plan, "post", **TAPS).to(dtype)
    taps = {n: p for n, p in model.named_parameters() if n.endswith("tile_taps")}
    assert len(taps) == 4
    without = small_model(plan, "post").to(dtype)
    without.load_state_dict({n: t for n, t in model.state_dict().items() if n not in taps})
    ids, pixels = prompt(2, 7)
    before = model(ids, pixels).logits
    for one in taps.values():
        assert one.dtype == torch.float32
        one.zero_()
    after, expected = model(ids, pixels).logits, without(ids, pixels).logits
    assert torch.equal(after, expected)
    assert not torch.equal(before, expected)


def test_a_student_begins_with_taps_of_zero_in_the_layers_that_have_them() -> None:
    for spec in mixer_specs().values():
        if "tile_taps" not in spec.options or not hasattr(mixer_class(spec.name), "add_gates"):
            continue
        for init in ("scratch", "inherit+mimic"):
            value = initial_value("model.layers.0.mixer.tile_taps", (3, 5), spec.name, init, 0)
            assert torch.equal(value, torch.zeros(3, 5))
    for options in (TAPS, {"tile_taps": True}):
        model = small_model("mdkg", "pre", **options)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert list(parameter_shapes(model.config).items()) == list(shapes.items())
    model = small_model("mama", "pre", tile_taps=True)
    names = [n for n, _ in model.named_parameters() if n.endswith("tile_taps")]
    assert names == ["model.layers.0.mixer.tile_taps"]
    assert not has_weight_decay(names[0])
    layers = model.model.layers
    layers[0].mixer.reset_parameters()
    assert not layers[0].mixer.tile_taps.any()
    assert layers[2].mixer.tile_taps is None


@shuffles
def test_tiles_are_the_columns_of_the_pictures(shuffle: str) -> None:
    model = fp64_model("mdkg", shuffle).model
    inputs = inputs_of_rows((2, 5), (0, 9), (1, 3))
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    assert pixels is not None
    assert model.vision is not None
    prompt_inputs = model.prepare(ids, pixels, mask)
    patches = model.vision(pixels)
    tokens, hidden = model.vision.merge(patches), model.embed(prompt_inputs)
    layouts = (prompt_inputs.embedding_layout, prompt_inputs.language_layout)
    merged = model.embedding_to_language(hidden, prompt_inputs)
    images = patches if shuffle == "post" else tokens
    for layout, seen, expected in zip(layouts, (hidden, merged), (images, tokens), strict=True):
        assert layout is not None
        assert layout.tiles is not None
        assert torch.equal(seen.flatten(0, 1)[layout.tiles].flatten(1, 2), expected)


@plans
@shuffles
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_batch_equals_the_row_alone(plan: str, shuffle: str, side: str) -> None:
    model = fp64_model(plan, shuffle)
    inputs = inputs_of_rows((2, 5), (0, 9), (1, 3))
    ids, mask = pad_batch([row for row, _ in inputs], side)
    together = model(ids, join_pixels([p for _, p in inputs]), mask).logits
    for i, (row, pixels) in enumerate(inputs):
        alone = model(row, pixels).logits
        assert distance(together[i][mask[i].bool()], alone[0]) < CLOSE


@plans
@shuffles
def test_packed_sequences_equal_separate_ones(plan: str, shuffle: str) -> None:
    model = fp64_model(plan, shuffle)
    inputs = inputs_of_rows((1, 5), (0, 9), (2, 3))
    ids = torch.cat([row for row, _ in inputs], dim=1)
    seq_idx = torch.cat([torch.full_like(row, i) for i, (row, _) in enumerate(inputs)], dim=1)
    packed = model(ids, join_pixels([p for _, p in inputs]), seq_idx=seq_idx).logits
    for i, (row, pixels) in enumerate(inputs):
        assert distance(packed[0][seq_idx[0] == i], model(row, pixels).logits[0]) < CLOSE


@plans
@shuffles
def test_chunks_never_cut_a_tile(plan: str, shuffle: str) -> None:
    """Every chunk size that holds a tile gives the whole prompt's logits; others are refused."""
    model = fp64_model(plan, shuffle)
    ids, pixels = inputs_of_rows((2, 7))[0]
    full = model(ids, pixels).logits
    smallest = 16 if shuffle == "post" else 4
    for size in range(smallest, smallest + 6):
        assert distance(model(ids, pixels, prefill_chunk_size=size).logits, full) < CLOSE
    with pytest.raises(DataError, match=f"chunk of {smallest - 1} columns .* at least {smallest}"):
        model(ids, pixels, prefill_chunk_size=smallest - 1)


@shuffles
def test_rows_with_tiles_at_different_columns_are_cut_between_all_of_them(shuffle: str) -> None:
    model = fp64_model("mdkg", shuffle)
    inputs = inputs_of_rows((2, 5), (0, 9), (1, 4))
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    real, full = mask.bool(), model(ids, pixels, mask).logits
    layout = model.model.prepare(ids, pixels, mask).embedding_layout
    assert layout is not None
    needed = layout.min_chunk
    assert needed < layout.length
    chunked = model(ids, pixels, mask, prefill_chunk_size=needed).logits
    assert distance(chunked[real], full[real]) < CLOSE
    with pytest.raises(DataError, match=f"at least {needed}"):
        model(ids, pixels, mask, prefill_chunk_size=needed - 1)
    assert layout.tiles is not None
    cut = int(layout.tiles[0, 1, 0]) % layout.length
    with pytest.raises(ValueError, match="cuts a tile"):
        layout.chunk(0, cut)


@plans
@shuffles
@pytest.mark.parametrize("static", [False, True])
def test_a_second_turn_equals_the_whole_conversation(plan: str, shuffle: str, static: bool) -> None:
    model = fp64_model(plan, shuffle)
    turns = inputs_of_rows((2, 5), (1, 6))
    ids, pixels = torch.cat([row for row, _ in turns], 1), join_pixels([p for _, p in turns])
    full = model(ids, pixels).logits
    cache = new_cache(model.config, max_length=ids.shape[1] if static else None)
    parts = [model(row, p, past_key_values=cache).logits for row, p in turns]
    assert distance(torch.cat(parts, 1), full) < CLOSE


@plans
def test_the_mixing_matrix_maps_values_to_read_outs_of_tiles(plan: str) -> None:
    model = fp64_model(plan, "pre")
    ids, pixels = inputs_of_rows((2, 5))[0]
    inputs = model.model.prepare(ids, pixels)
    hidden, layout = model.model.embed(inputs), inputs.language_layout
    for block in model.model.blocks:
        mixer: Any = block.mixer
        v, k, q, _ = mixer.values_keys_queries(hidden, layout)
        y, y0 = (mixer.scan(x, k, q, hidden, layout, None)[0] for x in (v, torch.zeros_like(v)))
        matrix = mixer.mixing_matrix(hidden, layout)
        expected = torch.einsum("bhts,bshp->bthp", matrix, v.repeat_interleave(2, dim=2))
        assert distance(y - y0, expected) < CLOSE
        assert distance(matrix, mixer.mixing_matrix(hidden, replace(layout, tiles=None))) > 1e-3


@shuffles
@pytest.mark.parametrize("plan", ["mdmd", "amad"])
def test_generated_tokens_are_equal(plan: str, shuffle: str) -> None:
    model = small_model(plan, shuffle, **TAPS)
    generator, options = Generator(model), {"max_new_tokens": 8}
    inputs = [prompt(2, 4, 3), prompt(1, 6, 4)]
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    batch = {"pixel_values": pixels, "attention_mask": mask, "do_sample": False, **options}
    expected = model.generate(ids, **batch)
    static = model.generate(ids, cache_implementation="static", **batch)
    assert torch.equal(static, expected)
    actual = generator.generate(ids, pixels, attention_mask=mask, **options)
    assert torch.equal(actual, expected[:, -actual.shape[1] :])
    one, its_pixels = inputs[0]
    with pytest.raises(DataError, match="chunk of 3 columns would cut a tile"):
        generator.generate(one, its_pixels, chunk=3, **options)
    whole = generator.generate(one, its_pixels, **options)
    assert torch.equal(generator.generate(one, its_pixels, chunk=17, **options), whole)


@shuffles
def test_a_student_learns_taps_on_the_inputs_of_its_teacher(shuffle: str) -> None:
    teacher = small_model("aaaa", shuffle)
    student = small_model("mdkg", shuffle, tile_taps=True)
    student.requires_grad_(True)
    pair = TeacherStudent(teacher, student)
    ids, pixels = prompt(2, 5)
    for given, reached in ((pixels, True), (None, False)):
        shown = ids if reached else ids.clamp(max=50)
        batch = Batch(shown, shown, None, None, given, num_samples=1, num_tokens=shown.numel())
        inputs = pair.prepare(batch)
        layout, blocks = inputs.embedding_layout, (teacher.model.blocks, student.model.blocks)
        assert layout is not None
        assert inputs.language_layout.tiles is None
        hidden = teacher.model.embed(inputs)
        student.zero_grad()
        layer = LayerInputs(blocks[0][0], blocks[1][0], hidden, hidden, layout)
        MixerMSE()(layer)[0].backward()
        gradient = student.model.layers[0].mixer.tile_taps.grad
        # Also on text, where it is zero: FSDP needs the same gradients on all processes.
        assert gradient is not None
        assert bool(gradient.any()) == reached


def test_options_that_a_model_cannot_have() -> None:
    config = small_model("mmmm", **TAPS).config
    raw = config.to_dict()
    assert to_architecture(raw, "config.json").mixer_config == config.mixer_config
    with pytest.raises(CheckpointError, match="tile_layers is 'some', expected embedding or all"):
        to_architecture({**raw, "mixer": {"tile_taps": True, "tile_layers": "some"}}, "config.json")
    with pytest.raises(CheckpointError, match=r"tile_layers is all, but mixer\.tile_taps is False"):
        to_architecture({**raw, "mixer": {"tile_layers": "all"}}, "config.json")
    with pytest.raises(CheckpointError, match="without vision has no tiles"):
        to_architecture({**raw, "vision": None}, "config.json")
    with pytest.raises(ValueError, match="no embedding stack"):
        HolisticVLMConfig.from_dict(
            {
                **raw,
                "embedding_stack": None,
                "layer_types": raw["layer_types"][:2],
                "num_hidden_layers": 2,
                "mixer": {"tile_taps": True},
            }
        )
    plain = HolisticVLMConfig.from_dict({**small_model("aaaa").config.to_dict(), "vision": None})
    with pytest.raises(RecipeError, match="without vision has no tiles"):
        student_config(plain, load_recipe("scenes-linear", ["mixer.tile_taps=true"]))
    assert small_model("mmmm").config.mixer_config.stored().keys().isdisjoint(TAPS)
    assert {MIXERS[letter] for plan in PLANS for letter in plan} == {
        name for name in mixer_specs() if hasattr(mixer_class(name), "values_keys_queries")
    }
