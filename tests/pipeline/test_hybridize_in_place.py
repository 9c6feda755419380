"""Hybrids of transformers' own models: the teacher's attention restored in some layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, prompts, save_teacher
from safetensors.torch import load_file, save_file
from test_seed_in_place import WEIGHTS, mmmamba, seed, weights

import mmmamba_cli
from mmmamba_cli.checkpoint import open_in_place
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.recipe import PLACEMENTS, place_attention
from mmmamba_cli.runs import Run
from mmmamba_cli.teachers import model_names

OPTIONS = ("--set", "mixer.conv_width=3", "--set", "mixer.qk_norm=true")


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher whose names on disk are older ones, and a seeded run."""
    folder = tmp_path_factory.mktemp("seeded")
    save_teacher(FAMILIES["llava_onevision"], folder / "teacher")
    seed(folder / "teacher", folder / "run", *OPTIONS)
    return folder


@pytest.fixture
def work(seeded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeded, tmp_path / "work"))


def hybridize(folder: Path, *words: object) -> dict[str, Any]:
    done = mmmamba("hybridize", *words, "--run", folder / "run", "--json")
    return dict(json.loads(done.stdout)["product"])


def mixers(folder: Path, name: str) -> dict[str, set[str]]:
    """Names of the tensors of each layer's mixer, by the layer."""
    product = folder / "run/products" / name
    own = model_names(open_in_place(product).config, load_file(product / WEIGHTS))
    found: dict[str, set[str]] = {}
    for key in own.values():
        start, has_mixer, part = key.partition(".self_attn.")
        if has_mixer and ".language_model." in key:
            found.setdefault(start.rpartition(".")[2], set()).add(part)
    return found


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement(placement: str, work: Path) -> None:
    made = hybridize(work, "--attn-layers", 2, "--placement", placement)
    expected = place_attention(placement, 2, LAYERS)
    assert made["attention_layers"] == list(expected) and made["num_layers"] == LAYERS
    found = mixers(work, made["name"])
    attention = {f"{part}_proj.weight" for part in "qkvo"} | {f"{n}_proj.bias" for n in "qkv"}
    for layer, parts in found.items():
        if int(layer) in expected:
            assert parts == attention, layer
        else:
            assert len(parts - attention) == 9 and {"q_norm.weight", "A_log"} <= parts, layer


def test_attention_is_the_teachers_and_the_rest_the_students(work: Path) -> None:
    product = work / "run/products/seed" / WEIGHTS
    # As distillation does: every tensor differs from the teacher's.
    save_file({key: value + 1 for key, value in load_file(product).items()}, product)
    hybridize(work, "--layers", "1")
    hybrid, student = weights(work / "run", "hybrid-at-1"), load_file(product)
    teacher = load_file(work / "teacher" / WEIGHTS)
    own = model_names(open_in_place(work / "teacher").config, teacher)
    for key, value in hybrid.items():
        is_restored = ".language_model.layers.1.self_attn." in own.get(key, "")
        assert torch.equal(value, teacher[key] if is_restored else student[key]), key


def test_all_attention_has_the_teachers_logits(work: Path) -> None:
    family = FAMILIES["llava_onevision"]
    hybridize(work, "--attn-layers", LAYERS)
    folder = work / "run/products" / f"hybrid-{LAYERS}"
    assert Run(work / "run").product(folder.name).kind == "all attention"
    student, teacher = mmmamba_cli.load(str(folder)), family.model()
    inputs = prompts(family, [("Where is it?", [])])
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


def test_a_layer_becomes_linear_again_with_its_options(work: Path) -> None:
    hybridize(work, "--attn-layers", LAYERS)
    hybridize(work, "--layers", "0,3", "--from", f"hybrid-{LAYERS}")
    folder = work / "run/products/hybrid-at-0-3"
    config = json.loads((folder / "config.json").read_text())["mmmamba"]
    assert config["mixers"] == ["attention", "mamba2", "mamba2", "attention"]
    assert config["mixer"]["conv_width"] == 3 and config["mixer"]["qk_norm"] is True
    seeded, hybrid = weights(work / "run"), weights(work / "run", folder.name)
    assert all(torch.equal(value, seeded[key]) for key, value in hybrid.items())
    mmmamba_cli.load(str(folder))


def test_another_teacher_and_a_measured_choice_are_refused(work: Path) -> None:
    state = load_file(work / "teacher" / WEIGHTS)
    changed = {key: value + (".layers.2.self_attn.q_" in key) for key, value in state.items()}
    other = Path(shutil.copytree(work / "teacher", work / "other"))
    save_file(changed, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MmmambaError, match=r"is not the teacher of .*layers.2.self_attn.q_proj"):
        hybridize(work, "--layers", "2", "--teacher", other)
    assert list(Run(work / "run").products()) == ["seed"]
    with pytest.raises(MmmambaError, match="--select does not score yet"):
        hybridize(work, "--attn-layers", 1, "--select", "kl-zero", "--data", work / "run/run.json")
    # The tensors of layer 1 are the same.
    hybridize(work, "--layers", "1", "--teacher", other)
    with pytest.raises(MmmambaError, match="must be from 0 to 3"):
        hybridize(work, "--layers", "4")


def test_a_teacher_that_is_gone(work: Path) -> None:
    record = work / "run/run.json"
    record.write_text(record.read_text().replace("/teacher", "/gone"))
    with pytest.raises(MmmambaError, match="is no longer at"):
        hybridize(work, "--layers", "1")
    assert list(Run(work / "run").products()) == ["seed"]
