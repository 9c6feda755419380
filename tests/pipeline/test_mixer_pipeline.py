"""Every mixer from a teacher to an export, and runs whose layers have several mixers."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from conversations import write_conversations
from ended import Command
from safetensors.torch import load_file
from small import small_model
from test_as_a_new_user import write_teacher
from torch import Tensor
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.architecture import LINEAR, MixerConfig, default_mixer, mixer_spec, mixer_specs
from mmmamba_cli.chat import ChatAnswer, Conversation, Settings, load_chat_model
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.evaluate import ModelIdentity
from mmmamba_cli.evaluate.model_adapter import HolisticVLMAdapter
from mmmamba_cli.recipe import parse_recipe
from mmmamba_cli.runs import Run, resolve_product

KINDS = [name for name, spec in mixer_specs().items() if spec.layer_type == LINEAR]
LAYERS = 3
STAGE = {"steps": 2, "batch_size": 2, "lr": 1e-3, "precision": "fp32", "inputs": "teacher"}
STAGE |= {"evaluate_every": None, "save_every": None}


def done(*words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(autouse=True)
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the code in an export, which takes most of the time and is the same for all."""
    monkeypatch.setattr("mmmamba_cli.export.sidecar_files.bundle_files", dict)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of one and two layers, and conversations."""
    folder = tmp_path_factory.mktemp("material")
    write_teacher(folder, 1, 2)
    write_conversations(folder, 4)
    return folder


def seed(material: Path, run: Path, *sets: str, recipe: object = "smoke") -> dict[str, Any]:
    words = [word for one in sets for word in ("--set", one)]
    arguments = ("--run", run, "--recipe", recipe, "--dtype", "fp32", "--json")
    return json.loads(done("seed", material / "hovle.ckpt", *arguments, *words).stdout)


def write_recipe(folder: Path, kind: str) -> Path:
    """A recipe of one stage for each loss; attention goes back into layer 1 for the last."""
    config = open_checkpoint(folder / "run/products/seed").config
    names = mixer_spec(kind).parameter_shapes(config.language, config.mixer_config, 32)
    matrix = [p for p in mixer_spec(kind).matrix_parameters if any(n.startswith(p) for n in names)]
    stages = [
        {**STAGE, "name": "mse", "learns": "new+qkv", "loss": "mixer-mse"},
        {
            **STAGE,
            "name": "matrix",
            "learns": [f"*.mixer.{part}*" for part in matrix],
            "loss": "matrix-orientation",
        },
        {**STAGE, "name": "hidden", "learns": "new+qkv", "loss": "hidden-alignment"},
        {
            **STAGE,
            "name": "kl",
            "learns": "new+qkv",
            "loss": "kl",
            "inputs": "student",
            "layers": "planned",
        },
    ]
    data = {"max_length": 128, "max_tiles": 1, "workers": 0}
    values = {"layers": {"attention": [1]}, "mixer": {"kind": kind}, "data": data}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "stages": stages}))
    return file


def weights(run: Path, name: str) -> dict[str, Tensor]:
    return load_file(run / "products" / name / "model.safetensors")


def mixer_of(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}.mixer."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def assert_answers(run: Path, fast: bool) -> None:
    """chat and eval answer as `generate` does, with the generator where it decodes the mixer."""
    found = resolve_product(Run(run), "linear")
    chat = load_chat_model(found, device="cpu")
    talk = Conversation((chat.name,))
    talk.ask("What is it?")
    answer = "".join(chat.answer(talk, Settings(8), ChatAnswer()))
    batch = chat.processor.chat(talk.messages(chat.name), padding=False)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "do_sample": False}
    tokens = chat.model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
    expected = chat.processor.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    assert answer.strip() == expected.strip()
    evaluated = HolisticVLMAdapter(chat.model, chat.processor, ModelIdentity(chat.name, "linear"))
    for generator in (chat.generator, evaluated.generator):
        assert (generator is not None) == fast


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixer_from_the_teacher_to_an_export(
    material: Path, tmp_path: Path, mmmamba: Command, kind: str
) -> None:
    run = tmp_path / "run"
    told = seed(material, run, f"mixer.kind={kind}")
    assert [row["layer"] for row in told["fidelity"]] == list(range(LAYERS))
    assert all(math.isfinite(row["relative_mse"]) for row in told["fidelity"])
    data = ("--data", material / "train.jsonl", "--image-root", material)
    done("distill", "--run", run, "--recipe", write_recipe(tmp_path, kind), *data)
    last = "hybrid-at-1-kl"
    chain = ["seed", "mse", "matrix", "hidden", "hybrid-at-1", last]
    products = Run(run).products()
    assert [name for name in products if not name.endswith("-best")] == chain
    for before, after in pairwise(chain):
        changed = {
            name
            for name, value in weights(run, before).items()
            if not torch.equal(weights(run, after).get(name, torch.empty(0)), value)
        }
        assert changed and all(".mixer." in name for name in changed), (before, after)
    assert open_checkpoint(run / "products" / last).config.mixer_names == (kind, "attention", kind)
    # Layer 1 takes its mixer from the nearest ancestor that has one.
    done("hybridize", "--run", run, "--attn-layers", 0, "--from", last)
    back = weights(run, "linear")
    assert_same(mixer_of(back, 1), mixer_of(weights(run, "hidden"), 1))
    assert_same(mixer_of(back, 2), mixer_of(weights(run, last), 2))
    assert open_checkpoint(run / "products/linear").config.mixer_names == (kind,) * LAYERS
    hub = tmp_path / "hub"
    done("export", "--run", run, "--from", "linear", "--format", "hub", "--out", hub)
    assert_same(load_file(hub / "model.safetensors"), back)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = [mmmamba_cli.load(str(f))(ids).logits for f in (hub, run / "products/linear")]
    assert torch.equal(*logits)
    assert_answers(run, fast=mixer_spec(kind).is_packed(MixerConfig()))
    for form in ("mmmamba-hf", "hovle"):
        out = tmp_path / form
        asked = ("export", "--run", run, "--from", "linear", "--format", form, "--out", out)
        if form == "mmmamba-hf" and kind == default_mixer(LINEAR):
            done(*asked)
            continue
        what = "linear layers" if form == "hovle" else f"{mixer_spec(kind).title} mixer"
        refused = mmmamba(*asked)
        assert refused.code == 2 and f"it has no {what}, and layer 0 is one" in refused.err
        assert len(refused.err.splitlines()) == 1


def test_layers_of_several_mixers(material: Path, tmp_path: Path, mmmamba: Command) -> None:
    run = tmp_path / "run"
    wrong = ("--recipe", "smoke", "--set", "layers.mixers={gated_delta: [0, 3]}")
    refused = mmmamba("seed", material / "hovle.ckpt", "--run", run, *wrong)
    assert refused.code == 2 and "layers.mixers.gated_delta[1]: is 3" in refused.err
    assert not run.exists() and len(refused.err.splitlines()) == 1
    told = seed(material, run, "mixer.kind=kda", "layers.mixers={gated_delta: [0, 2]}")
    assert len(told["fidelity"]) == LAYERS
    mixed = ("gated_delta", "kda", "gated_delta")
    assert open_checkpoint(run / "products/seed").config.mixer_names == mixed
    first = weights(run, "seed")
    assert mixer_of(first, 0)["dt_bias"].dim() == 1
    assert mixer_of(first, 1)["dt_bias"].dim() == 2
    done("hybridize", "--run", run, "--layers", "1,2")
    hybrid = run / "products/hybrid-at-1-2"
    assert open_checkpoint(hybrid).config.mixer_names == ("gated_delta", "attention", "attention")
    done("hybridize", "--run", run, "--attn-layers", 0, "--from", "hybrid-at-1-2")
    assert open_checkpoint(run / "products/linear").config.mixer_names == mixed
    assert_same(weights(run, "linear"), first)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("mixer.kind=kda", "the recipe gives layer 1 the mixer kda, but in 'hybrid-at-0' it has "),
        ("layers.mixers={gla: [2]}", "the recipe gives layer 2 the mixer gla, but in "),
        ("layers.mixers={gla: [5]}", "layers.mixers.gla[0]: is 5"),
        ("mixer.conv_width=4", "mixer.conv_width: is 4, but 'hybrid-at-0' was seeded with 2"),
    ],
)
def test_a_recipe_of_other_mixers_is_refused(
    material: Path, tmp_path: Path, mmmamba: Command, assignment: str, message: str
) -> None:
    seed(material, tmp_path / "run")
    done("hybridize", "--run", tmp_path / "run", "--layers", "0")
    data = ("--data", material / "train.jsonl", "--image-root", material)
    refused = mmmamba("distill", "--run", tmp_path / "run", *data, "--set", assignment)
    assert refused.code == 2 and f"error: {message}" in refused.err
    assert list(Run(tmp_path / "run").products()) == ["seed", "hybrid-at-0"]


def test_an_import_keeps_the_mixers_of_the_layers(material: Path, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    seed(material, run, "mixer.rope=true", "layers.mixers={gated_delta: [2]}")
    folder = tmp_path / "folder"
    folder.mkdir()
    # A native folder without a manifest, hence without a recipe.
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((run / "products/seed" / name).read_bytes())
    done("import", folder, "--run", again)
    usual = default_mixer(LINEAR)
    config = open_checkpoint(again / "products/imported").config
    assert config.mixer_names == (usual, usual, "gated_delta")
    recipe = parse_recipe(Run(again).product("imported").recipe, "manifest")
    assert (recipe.mixer.kind, recipe.mixer.rope) == (usual, True)
    assert recipe.layers.mixers == {"gated_delta": (2,)}
    assert_same(weights(again, "imported"), weights(run, "seed"))


def test_an_import_leaves_out_options_that_no_linear_layer_reads(tmp_path: Path) -> None:
    """They are left over where the layers that read them became attention."""
    small_model("dada", d_skip=True, rope=True).save_pretrained(tmp_path / "folder")
    done("import", tmp_path / "folder", "--run", tmp_path / "run")
    recipe = parse_recipe(Run(tmp_path / "run").product("imported").recipe, "manifest")
    assert (recipe.mixer.kind, recipe.mixer.d_skip, recipe.mixer.rope) == (
        "gated_delta",
        False,
        True,
    )
