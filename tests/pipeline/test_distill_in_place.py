"""Distillation of students of transformers' models, from `seed` to products."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import write_conversations
from families import FAMILIES, LAYERS, save_teacher
from safetensors.torch import load_file
from test_overwrite import killed, metrics
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.cli.app import app
from mmmamba_cli.distill import METRICS, read_metrics
from mmmamba_cli.distill.stage_models import open_stage_models, trainable_of
from mmmamba_cli.errors import MmmambaError, RecipeError
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run

# Its processor needs neither torchvision nor num2words.
FAMILY = "idefics3"
FINAL = "hybrid-1-stage3"
PLACES = [
    ["open", "/training/stage1/.step-00000002", 1],
    ["open", "/products/.hybrid-1-stage3.partial", 3],
]
# MMMAMBA_KILLS=10 adds random places.
KILLS = max(len(PLACES), int(os.environ.get("MMMAMBA_KILLS", "0")))
QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "products" / name / "model.safetensors")


def distill(folder: Path, run: Path, *words: object) -> Any:
    data = ("--data", folder / "train.jsonl", "--held-out", folder / "held_out.jsonl")
    return mmmamba("distill", "--run", run, "--device", "cpu", *data, *words)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, conversations with pictures and a seeded run."""
    folder = tmp_path_factory.mktemp("in_place")
    save_teacher(FAMILIES[FAMILY], folder / "teacher")
    write_conversations(folder, 8)
    write_conversations(folder, 2, 1, "held_out")
    settings = ["data.max_length=400"]
    for stage in ("stage1", "stage2", "stage3"):
        settings += [f"stages.{stage}.steps=2", f"stages.{stage}.save_every=1"]
    words = ("--recipe", "smoke", "--dtype", "fp32", "--no-report")
    options = [word for setting in settings for word in ("--set", setting)]
    mmmamba("seed", folder / "teacher", "--run", folder / "run", *words, *options)
    return folder


@pytest.fixture(scope="module")
def distilled(seeded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been through all stages of the smoke recipe."""
    run = Path(shutil.copytree(seeded / "run", tmp_path_factory.mktemp("distilled") / "run"))
    result = distill(seeded, run)
    assert result.exit_code == 0, result.output
    assert "data.max_tiles is ignored" in result.output
    return run


def test_stages_train_what_they_name(distilled: Path) -> None:
    seed, one, two, three = (
        weights(distilled, name) for name in ("seed", "stage1", "stage2", FINAL)
    )
    assert one.keys() == seed.keys() == two.keys()
    changed = {name for name in seed if not torch.equal(seed[name], one[name])}
    new = {name for name in seed if ".text_model." in name and ".self_attn." in name}
    new -= {name for name in new if name.endswith((*QKV, "o_proj.weight"))}
    assert len(new) == 7 * LAYERS
    assert changed == new
    changed = {name for name in seed if not torch.equal(one[name], two[name])}
    assert changed == new | {n for n in seed if ".text_model." in n and n.endswith(QKV)}
    (layer,) = {name.split(".")[3] for name in set(two) - set(three)}
    restored = [n for n in three if n.startswith(f"model.text_model.layers.{layer}.self_attn.")]
    assert len(restored) == 4
    # The teacher's, which the seed still has: stage 3 trains the other layers.
    assert all(torch.equal(three[name], seed[name]) for name in restored)
    assert any(not torch.equal(three[name], two[name]) for name in three if name not in restored)


def test_products_are_complete(distilled: Path) -> None:
    run = Run(distilled)
    product = run.product(run.record.current)
    assert product.stages == ("stage1", "stage2", "stage3") and product.final
    assert product.kind == "hybrid (1 attention)" and product.metrics["step"] == 2
    for name in run.products():
        run.verify_product(name)
    folder = run.product_folder(product.name)
    assert {"metrics.jsonl", "processor_config.json", "chat_template.jinja"} <= {
        file.name for file in folder.iterdir()
    }
    student = mmmamba_cli.load(str(folder))
    assert type(student).__name__ == "StudentIdefics3ForConditionalGeneration"
    assert list(read_metrics(folder / METRICS))[-1]["held_out/loss"] > 0


def test_a_finished_run_has_nothing_left_to_do(distilled: Path, seeded: Path) -> None:
    with pytest.raises(MmmambaError, match="nothing is left to do"):
        distill(seeded, distilled)
    result = distill(seeded, distilled, "--stage", "stage3")
    assert "hybrid-1-stage3 is finished already" in result.output


def test_kills_give_the_same_bits(distilled: Path, seeded: Path, tmp_path: Path) -> None:
    """While a state and a product are written, and at random operations with MMMAMBA_KILLS."""
    shutil.copytree(seeded / "run", tmp_path / "run")
    data = ("--data", seeded / "train.jsonl", "--held-out", seeded / "held_out.jsonl")
    words = ("distill", "--run", tmp_path / "run", "--device", "cpu", *data)
    rng = random.Random(KILLS)
    # In the order of the command, with few operations between random ones.
    places = [PLACES[0], *(rng.randint(1, 15) for _ in range(KILLS - len(PLACES))), PLACES[1]]
    starts = killed(tmp_path, words, places)
    assert ["killed" in start for start in starts] == [*[True] * KILLS, False]
    one, two = Run(tmp_path / "run"), Run(distilled)
    assert one.products().keys() == two.products().keys()
    for name, product in one.products().items():
        assert product.content_hash == two.product(name).content_hash, name
    assert metrics(tmp_path, FINAL) == metrics(distilled.parent, FINAL)


def test_packed_rows_train_as_rows_of_one_conversation(
    distilled: Path, seeded: Path, tmp_path: Path
) -> None:
    shutil.copytree(seeded / "run", tmp_path / "run")
    packed = ("--set", "data.batching=packed", "--set", "data.max_length=2000")
    assert distill(seeded, tmp_path / "run", *packed).exit_code == 0
    for stage in ("stage1", "stage2", FINAL):
        found, expected = (
            [value for row in metrics(folder, stage) for key, value in row.items() if "loss" in key]
            for folder in (tmp_path, distilled.parent)
        )
        # Two steps, and the held-out loss after the last.
        assert len(found) == 3
        assert found == pytest.approx(expected, rel=1e-5)


def test_joined_experts_cannot_learn(tmp_path: Path) -> None:
    """Their tensors are several in the file, so a product could not be written."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "teacher")
    words = ("--recipe", "smoke", "--dtype", "fp32", "--no-report", "--set", "layers.attention=1")
    mmmamba("seed", tmp_path / "teacher", "--run", tmp_path / "run", *words)
    models = open_stage_models(Run(tmp_path / "run"), "seed", None)
    stage = load_recipe("smoke").stages[2]
    joined = stage.model_copy(update={"learns": ("*.mlp.experts.*",)})
    with pytest.raises(RecipeError, match=r"experts\.\w+ cannot learn: transformers joins it"):
        models.objective(joined, trainable_of(models, joined)[0])
    models.objective(stage, trainable_of(models, stage)[0])
