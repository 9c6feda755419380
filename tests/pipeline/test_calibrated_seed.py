"""A calibrated start: closed forms, the product, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import write_conversations
from safetensors.torch import load_file
from torch.nn.functional import silu, softplus
from typer.testing import CliRunner

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, DataError, RecipeError
from mmmamba_cli.model.mixer import mixer_class
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.recipe import Data, load_recipe
from mmmamba_cli.seed.calibrated_start import (
    HALF_LIVES,
    LayerSums,
    inverse_silu,
    keep_long_memories,
    load_start,
)
from mmmamba_cli.seed.calibration_walk import read_calibration_samples
from mmmamba_cli.seed.weight_transfer import student_config


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def seed(folder: Path, run: Path, *words: object) -> dict[str, Any]:
    arguments = ("--run", run, "--recipe", "smoke", "--dtype", "fp32", "--no-report", "--json")
    return json.loads(mmmamba("seed", folder / "hovle.ckpt", *arguments, *words).stdout)["product"]


def small_mixer(folder: Path) -> Any:
    recipe = load_recipe("smoke", (), {})
    config = student_config(open_checkpoint(folder / "hovle.ckpt").config, recipe)
    torch.manual_seed(0)
    mixer = mixer_class(config.mixer_names[2])(config, 2)
    with torch.no_grad():
        for name, one in mixer.named_parameters():
            if name.endswith("proj.weight"):
                one.normal_(std=0.3)
        mixer.dt_proj.weight.zero_()
        mixer.g_norm.weight.fill_(1)
    return mixer


def columns(mask: torch.Tensor) -> SequenceLayout:
    batch, length = mask.shape
    rope = torch.zeros(batch, length, 8)
    return SequenceLayout(cos=rope, sin=rope, mask=mask, past=0)


def test_inverse_of_silu() -> None:
    values = torch.tensor([-0.27, -0.1, 0.0, 0.5, 30.0], dtype=torch.float64)
    found = inverse_silu(values)
    assert torch.allclose(silu(found), values, atol=1e-12)
    assert found[0] > -1.278
    assert torch.equal(inverse_silu(torch.tensor([-3.0])), inverse_silu(torch.tensor([-0.27])))


def test_heads_that_keep_long_memories() -> None:
    explained = torch.zeros(len(HALF_LIVES), 4)
    explained[2], explained[7] = 3.0, torch.tensor([1.0, 2.0, 0.5, 0.0])
    # 400 columns need candidate 6 (500) or a longer one; head 1 loses least with 7 (2,000).
    assert keep_long_memories(explained, 400).tolist() == [2, 7, 2, 2]
    explained[8, 3] = 4.0
    assert keep_long_memories(explained, 400).tolist() == [2, 2, 2, 8]
    sixteen = keep_long_memories(explained[:, :1].repeat(1, 16), 400)
    # 400 and its square root: 4 is a half-life of 48.
    assert sorted(sixteen.tolist()) == [2] * 14 + [7, 7]
    flat = torch.zeros(len(HALF_LIVES), 16)
    assert sorted(keep_long_memories(flat, 400).tolist()) == [0] * 14 + [4, 6]


@torch.no_grad()
def test_planted_decays_and_gate_are_found(seeded: Path) -> None:
    """A teacher that is a mixer with constant decays and a constant gate is found again."""
    mixer = small_mixer(seeded)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 60, 32, generator=rng)
    hidden[..., 0] = 4
    mask = torch.ones(6, 60, dtype=torch.bool)
    mask[1, 40:] = False
    planted = torch.tensor([2.0, 500.0, 6.0, 16.0], dtype=torch.float64)
    rates = math.log(2) / planted
    mixer.load_state_dict(mixer.constant_decay(rates, torch.ones(4).double()), False)
    gate = torch.randn(32, generator=rng)
    mixer.g_proj.weight.zero_()
    mixer.g_proj.weight[:, 0] = gate / 4
    expected = mixer.mix(hidden, columns(mask))
    # Padding must not matter.
    hidden[~mask], expected[~mask] = 100.0, 100.0

    sums = LayerSums(mixer, 32)
    for part in (slice(0, 2), slice(2, 6)):
        sums.add(hidden[part], columns(mask[part]), expected[part])
    start = sums.solve(0, longest=60)

    assert start.half_lives == tuple(planted.tolist())
    assert torch.allclose(silu(start.gate_scale).float(), silu(gate).clamp(min=-0.27), atol=5e-3)
    steps = softplus(start.decay["dt_bias"])
    assert torch.allclose(start.decay["A_log"].exp() * steps, rates.float(), rtol=1e-5)
    load_start(mixer, start)
    v, k, q, _ = mixer.values_keys_queries(hidden, columns(mask))
    y, _ = mixer.scan(v, k, q, hidden, columns(mask), None)
    inside = (steps > 1e-3 * 1.01) & (steps < 0.99)
    rms = y[mask].square().mean((0, 2)).sqrt()
    assert inside.any() and torch.allclose(rms[inside], torch.ones(4)[inside], rtol=1e-3)
    error = (mixer.mix(hidden, columns(mask)) - expected)[mask].square().sum()
    assert error < 1e-3 * expected[mask].square().sum()


def test_outputs_that_are_not_finite(seeded: Path) -> None:
    mixer = small_mixer(seeded)
    hidden = torch.randn(1, 9, 32)
    with torch.no_grad():
        sums = LayerSums(mixer, 32)
        sums.add(hidden, columns(torch.ones(1, 9).bool()), torch.full((1, 9, 32), math.nan))
        with pytest.raises(CheckpointError, match="layer 3 of the teacher gives NaN"):
            sums.solve(3, 9)


def test_a_calibrated_product(seeded: Path, tmp_path: Path) -> None:
    data = ("--set", f"data.train={seeded / 'train.jsonl'}", "--init", "calibrated")
    made = seed(seeded, tmp_path / "run", *data)
    again = seed(seeded, tmp_path / "again", *data)
    mimic = seed(seeded, tmp_path / "mimic")
    assert made["content_hash"] == again["content_hash"] != mimic["content_hash"]
    assert set(made["data"]) == {"calibration"} and made["data"] == again["data"]
    assert [parent["role"] for parent in made["parents"]] == ["teacher"]
    fidelity = made["metrics"]["calibration"]
    assert fidelity["samples"] == 12 and len(fidelity["layers"]) == 8
    for row in fidelity["layers"]:
        assert row["relative_mse"] < row["relative_mse_mimic"] and row["cosine"] > 0.1, row
        assert set(row["half_lives"]) <= set(HALF_LIVES)
    assert "calibrated on 12 samples" in made["notes"][-1]

    one, other = (
        load_file(tmp_path / run / "products/seed/model.safetensors") for run in ("run", "mimic")
    )
    changed = {name.split(".mixer.")[-1] for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"A_log", "dt_bias", "g_proj.weight"}
    small = ("--stage", "stage1", "--device", "cpu", "--set", "stages.stage1.steps=1")
    mmmamba("distill", "--run", tmp_path / "run", "--recipe", "smoke", *data[:2], *small)
    assert (tmp_path / "run/products/stage1/manifest.json").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.train=null"], "needs samples, and data.train is null"),
        (["mixer.kind=gated_delta"], "which Mamba-2 with input_step has and Gated DeltaNet of"),
        (["layers.mixers.window=[1]"], "which Mamba-2 with input_step has and .* of this recipe"),
        (["mixer.input_step=false"], "which Mamba-2 with input_step has and Mamba-2 of this"),
    ],
)
def test_refusals(seeded: Path, tmp_path: Path, words: list[str], sentence: str) -> None:
    sets = [part for word in words for part in ("--set", word)]
    with pytest.raises(RecipeError, match=sentence):
        seed(seeded, tmp_path / "run", "--init", "calibrated", *sets)
    assert not (tmp_path / "run/products").exists()


def test_too_few_samples(seeded: Path, tmp_path: Path) -> None:
    file = write_conversations(tmp_path, 3)
    with pytest.raises(DataError, match="has 3 samples that can be read, calibration needs at"):
        seed(seeded, tmp_path / "run", "--init", "calibrated", "--set", f"data.train={file}")


def first_rows(folder: Path, data: Data, seed: int) -> list[list[int]]:
    """The token ids of the first batch of samples."""
    teacher = open_checkpoint(folder / "hovle.ckpt")
    (batch, *_) = read_calibration_samples(teacher, data, seed).batches
    pairs = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [row[real].tolist() for row, real in pairs]


def test_samples_are_those_of_training(seeded: Path) -> None:
    data = Data(train=str(seeded / "train.jsonl"), image_root=str(seeded), max_length=400)
    in_order = first_rows(seeded, data.model_copy(update={"shuffle": False}), 0)
    assert in_order == first_rows(seeded, data.model_copy(update={"shuffle": False}), 1)
    assert in_order != first_rows(seeded, data, 0) != first_rows(seeded, data, 1)
    by_data = data.model_copy(update={"shuffle_seed": 1})
    assert first_rows(seeded, by_data, 0) == first_rows(seeded, data, 1)


def test_too_many_unreadable_samples(seeded: Path, tmp_path: Path) -> None:
    lines = (seeded / "train.jsonl").read_text().replace("train-1.png", "gone.png")
    (tmp_path / "bad.jsonl").write_text(lines)
    words = ("--init", "calibrated", "--set", f"data.train={tmp_path / 'bad.jsonl'}")
    images = ("--set", f"data.image_root={seeded}", "--set", "data.max_length=400")
    share = ("--set", "data.max_bad_share=0.05")
    with pytest.raises(DataError, match="1 of 12 samples could not be used, more than"):
        seed(seeded, tmp_path / "run", *words, *images, *share)
    assert seed(seeded, tmp_path / "run", *words, *images, "--set", "data.max_bad_share=0.1")
