"""Profiles of transformers' models: their decoder, and a run's students beside its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ended import Command
from families import FAMILIES, save_teacher
from family_students import student
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.profiling import WrongDecoder, profiler, weight_store
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.in_place_decoder import InPlaceDecoder
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, GROWING, STATIC, STATIC_TEACHER
from mmmamba_cli.profiling.result import RooflinePart
from mmmamba_cli.profiling.subjects import run_subjects
from mmmamba_cli.teachers.cache_slot import RecurrentSlot

# Multimodal RoPE, and layers of sliding windows.
NAMES = ("qwen3_vl", "gemma3")
COLUMNS = 20
RATES = RooflinePart(copy_rate=1e10, matmul_rate=1e11, size=1, side=1)


def decoder(name: str, plan: str, cache: str) -> InPlaceDecoder:
    model = FAMILIES[name].model().double() if plan == "teacher" else student(name, plan)
    return InPlaceDecoder(model, cache)


@pytest.mark.parametrize("plan", ["teacher", "hybrid mamba2", "all gated_delta"])
@pytest.mark.parametrize("name", NAMES)
def test_both_caches_give_the_logits_without_a_cache(name: str, plan: str) -> None:
    found = check_decoder(name, decoder(name, plan, STATIC))
    assert set(found.distances) == {"as measured", "growing cache"}
    assert 0 < max(found.distances.values()) < found.tolerance


def test_a_wrong_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    update = RecurrentSlot.update_recurrent_state

    def forgets(self: RecurrentSlot, state: torch.Tensor, *more: Any) -> Any:
        return update(self, state * 0.5, *more)

    monkeypatch.setattr(RecurrentSlot, "update_recurrent_state", forgets)
    with pytest.raises(WrongDecoder):
        check_decoder("student", decoder("qwen3_vl", "hybrid mamba2", STATIC))


def test_prefill_in_chunks() -> None:
    found = decoder("qwen3_vl", "hybrid mamba2", GROWING)
    ids = found.random_prompt(2, COLUMNS, torch.Generator().manual_seed(0))
    logits = []
    for chunk in (None, 7):
        found.start(2, COLUMNS)
        logits.append(found.prefill(ids, chunk))
    torch.testing.assert_close(*logits, atol=1e-7, rtol=0)


@pytest.mark.parametrize("cache", [GROWING, STATIC])
@pytest.mark.parametrize("name", NAMES)
def test_random_contents_are_those_of_a_prefill_in_size(name: str, cache: str) -> None:
    found = decoder(name, "hybrid mamba2", cache)
    rng = torch.Generator().manual_seed(0)
    taken = []
    for fill in (
        lambda: found.prefill(found.random_prompt(2, COLUMNS, rng)),
        lambda: found.fill_random(2, COLUMNS, rng),
    ):
        found.start(2, COLUMNS + 3)
        fill()
        assert isinstance(found.cache, StaticCache if cache == STATIC else DynamicCache)
        lengths = [int(layer.get_seq_length()) for layer in found.cache.layers]
        taken.append((found.cache_bytes, lengths))
    assert taken[0] == taken[1]
    assert taken[0][1] == [COLUMNS] * 4
    first = found.decode(1).clone()
    assert found.decode(2).shape == first.shape == (2, 1)


def test_random_prompts_have_no_placeholder_of_a_picture() -> None:
    found = decoder("qwen3_vl", "teacher", GROWING)
    ids = found.random_prompt(8, 400, torch.Generator().manual_seed(0))
    config = found.model.config
    for token in (config.image_token_id, config.video_token_id, config.vision_start_token_id):
        assert not bool((ids == token).any())
    assert len(ids.unique()) > 100


def test_the_floor_counts_layers_and_the_keys_of_windows() -> None:
    """Gemma 3 has windows of 8 columns in layers 0 and 2, which here are Mamba-2, and full ones."""
    model = decoder("gemma3", "teacher", GROWING)
    layers = model.model.get_decoder().layers
    weights = sum(p.nbytes for p in (*layers.parameters(), model.model.lm_head.weight))
    key_bytes = 2 * 2 * 8 * 8  # keys and values, heads, channels, bytes
    assert model.cost(1, 100, prefill=False).bytes == weights + key_bytes * (2 * 8 + 2 * 100)
    elements = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    head = model.model.lm_head.weight.numel()
    pairs = 2 * (8 * 9 // 2 + 92 * 8) + 2 * (100 * 101 // 2)
    expected = 2 * (100 * elements + head + 2 * pairs * 4 * 8)
    assert model.cost(1, 100, prefill=True).operations == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a Gemma 3 teacher with a seeded student and a hybrid."""
    folder = tmp_path_factory.mktemp("profile-in-place")
    save_teacher(FAMILIES["gemma3"], folder / "gemma3")
    seed = ("--dtype", "fp32", "--no-report", "--allow-bidirectional")
    for words in (("seed", folder / "gemma3", *seed), ("hybridize", "--attn-layers", 1)):
        done = CliRunner().invoke(app, [*map(str, words), "--run", str(folder / "run")])
        assert done.exit_code == 0, done.output
    return folder / "run"


def test_a_run_beside_its_teacher(
    mmmamba: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "render_plot", lambda profile, kind: None)
    monkeypatch.setattr(profiler, "measure_roofline", lambda *given: RATES)
    words = ("--run", run, "--contexts", 16, "--repeats", 1, "--out", tmp_path)
    done = mmmamba("profile", *words)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "profile.json").read_text())
    parts = {one["name"]: one for one in found["subjects"]}
    assert list(parts) == [AS_SHIPPED, STATIC_TEACHER, "seed", "hybrid-1"]
    assert {one["way"] for one in parts.values()} == {"transformers"}
    assert [one["cache"] for one in parts.values()] == [GROWING, STATIC, STATIC, STATIC]
    assert parts["hybrid-1"]["kind"] == "hybrid (1 attention)"
    assert parts["hybrid-1"]["mixers"] == ["mamba2"]
    assert all(one["status"] == "measured" and one["floor"] for one in found["measurements"])
    assert len(found["measurements"]) == 8 and len(found["ratios"]) == 8
    assert "all by the forward pass of their class in transformers" in done.out
    assert "CUDA graphs, packed and int8 weights are not for them" in done.out
    assert "HoVLE's own code" not in done.out


def test_int8_is_refused(mmmamba: Command, run: Path, tmp_path: Path) -> None:
    done = mmmamba("profile", "--run", run, "--int8", "--out", tmp_path)
    assert (done.code, done.out) == (2, "")
    message = "cannot have int8 weights: models of transformers are decoded by their own class"
    assert message in done.err


def test_equal_weights_are_stored_once(run: Path) -> None:
    shipped, static, seed, hybrid = run_subjects(weight_store("cpu", "fp32"), run)
    teacher: Any = shipped.build()
    assert static.build().model is teacher.model  # type: ignore[attr-defined]
    theirs = dict(teacher.model.named_parameters())
    models: list[Any] = [seed.build(), hybrid.build()]
    for one in models:
        own = dict(one.model.named_parameters())
        assert own.keys() > theirs.keys()
        assert all(own[name] is theirs[name] for name in theirs)
        assert one.weight_bytes > teacher.weight_bytes
    new = models[1].model.named_parameters()
    mixers = dict(models[0].model.named_parameters())
    assert all(mixers[name] is parameter for name, parameter in new)
