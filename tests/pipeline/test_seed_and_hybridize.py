"""Seeding and hybridizing: weights, refusals, and atomic writes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import atomic_writes, open_checkpoint
from mmmamba_cli.checkpoint.name_map import foreign_tensors
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, MmmambaError, RunError
from mmmamba_cli.export import unchanged_ancestors
from mmmamba_cli.runs import Manifest, Parent, Run
from mmmamba_cli.runs.manifest import manifest_text
from mmmamba_cli.seed import initial_value

LAYERS = 5


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def seed(source: Path, run: Path, *words: object) -> dict[str, Any]:
    arguments = (source, "--run", run, "--dtype", "fp32", "--no-report", "--json")
    return json.loads(mmmamba("seed", *arguments, *words).stdout)


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "products" / name / "model.safetensors")


def mixer_of(state: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}.mixer."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_seed_inherits_weights_and_adds_parameters(hovle_folder: Path, tmp_path: Path) -> None:
    seed(hovle_folder, tmp_path / "run")
    teacher, student = open_checkpoint(hovle_folder), weights(tmp_path / "run", "seed")
    new = {"A_log", "dt_bias", "dt_proj.weight", "g_proj.weight", "g_norm.weight"}
    new |= {"conv1d.weight", "conv1d.bias"}
    for name in teacher.shapes:
        assert torch.equal(student[name], teacher.read(name)), name
    extra = set(student) - set(teacher.shapes)
    assert extra == {f"model.layers.{i}.mixer.{n}" for i in range(LAYERS) for n in new}


def test_mimic_initialisation_is_the_papers(hovle_folder: Path, tmp_path: Path) -> None:
    seed(hovle_folder, tmp_path / "run")
    mixer = mixer_of(weights(tmp_path / "run", "seed"), 3)
    assert torch.equal(mixer["A_log"], torch.ones(4))
    assert not mixer["dt_proj.weight"].any() and not mixer["conv1d.bias"].any()
    assert torch.equal(mixer["conv1d.weight"][:, 0], torch.tensor([0.0, 1.0]).expand(128, 2))
    bound = 2**-2.5 * math.sqrt(6 / 128)
    assert 0.95 * bound < mixer["g_proj.weight"].abs().max() <= bound
    dt = torch.nn.functional.softplus(
        initial_value("x.mixer.dt_bias", (9999,), "mamba2", "inherit+mimic", 0)
    )
    assert 1e-3 - 1e-6 <= dt.min() < 1.1e-3 and 0.09 < dt.max() <= 0.1 + 1e-6
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.05


@pytest.mark.parametrize("init", ["scratch", "inherit", "inherit+mimic"])
def test_parameters_that_each_init_inherits(hovle_folder: Path, tmp_path: Path, init: str) -> None:
    seed(hovle_folder, tmp_path / "run", "--init", init)
    teacher = open_checkpoint(hovle_folder)
    state = weights(tmp_path / "run", "seed")
    name = "model.layers.1.mixer.q_proj.weight"
    assert torch.equal(state[name], teacher.read(name)) == (init != "scratch")
    assert torch.equal(state["lm_head.weight"], teacher.read("lm_head.weight"))
    is_mimic = not state["model.layers.1.mixer.dt_proj.weight"].any()
    assert is_mimic == (init == "inherit+mimic")


def test_seed_is_repeatable_and_bound_to_its_seed(hovle_folder: Path, tmp_path: Path) -> None:
    hashes = [
        seed(hovle_folder, tmp_path / str(i), "--seed", s)["product"]["content_hash"]
        for i, s in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_bf16_keeps_small_parameters_in_fp32(hovle_folder: Path, tmp_path: Path) -> None:
    seed(hovle_folder, tmp_path / "run", "--dtype", "bf16")
    state = weights(tmp_path / "run", "seed")
    small = ("A_log", "dt_bias", "norm")
    for name, tensor in state.items():
        expected = torch.float32 if any(s in name for s in small) else torch.bfloat16
        assert tensor.dtype == expected, name
    model = mmmamba_cli.load(str(tmp_path / "run/products/seed"))
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_bare_state_dict_gives_the_same_student(
    hovle_folder: Path, hovle_ckpt: Path, tmp_path: Path
) -> None:
    folder = seed(hovle_folder, tmp_path / "a")["product"]["content_hash"]
    bare = seed(hovle_ckpt, tmp_path / "b")["product"]["content_hash"]
    assert folder == bare


def test_hybrid_gets_the_teachers_attention_back(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    mmmamba("hybridize", "--attn-layers", 2, "--run", run)
    teacher, linear = open_checkpoint(hovle_folder), weights(run, "seed")
    hybrid = weights(run, "hybrid-2")
    for layer in range(LAYERS):
        mixer = mixer_of(hybrid, layer)
        if layer in (0, 2):
            assert set(mixer) == {f"{n}_proj.weight" for n in "qkvo"}
            for name, tensor in mixer.items():
                assert torch.equal(tensor, teacher.read(f"model.layers.{layer}.mixer.{name}"))
        else:
            kept = mixer_of(linear, layer)
            assert set(mixer) == set(kept)
            assert all(torch.equal(mixer[n], kept[n]) for n in kept)
    assert Run(run).record.current == "hybrid-2"
    assert not Run(run).product("hybrid-2").final


def test_all_attention_again_is_the_teacher(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    mmmamba("hybridize", "--attn-layers", LAYERS, "--run", run)
    golden = load_file(Path(__file__).parents[1] / "golden/hovle_post/golden.safetensors")
    model = mmmamba_cli.load(str(run / f"products/hybrid-{LAYERS}"))
    logits = model(golden["input.input_ids"], golden["input.pixel_values"]).logits
    assert (logits - golden["teacher.logits"]).norm() <= 1e-4 * golden["teacher.logits"].norm()


def test_linear_hybrid_linear_and_a_changed_set(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    mmmamba("hybridize", "--layers", "1,3", "--run", run)
    mmmamba("hybridize", "--layers", "0,3", "--from", "hybrid-at-1-3", "--run", run)
    mmmamba("hybridize", "--attn-layers", 0, "--from", "hybrid-at-0-3", "--run", run)
    first, back = weights(run, "seed"), weights(run, "linear")
    assert set(first) == set(back)
    assert all(torch.equal(first[name], back[name]) for name in first)


def test_ancestors_of_a_product(tmp_path: Path) -> None:
    def write(name: str, content_hash: str, parent: Parent | None = None) -> Manifest:
        folder = tmp_path / "products" / name
        folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(
            name=name,
            made_by="seed",
            created=name,
            command="",
            content_hash=content_hash,
            parents=(Parent("teacher", "t", "0"), *([] if parent is None else [parent])),
            attention_layers=(),
            num_layers=1,
            dtype="float32",
            parameters=0,
            recipe="",
        )
        (folder / "manifest.json").write_text(manifest_text(manifest))
        return manifest

    run, first = Run(tmp_path), write("a", "1")
    second = write("b", "2", Parent("student", "a", "1"))
    third = write("c", "3", Parent("student", "b", "2"))
    assert first.derived_from is None and list(run.ancestors(first)) == []
    assert [found for _, found in run.ancestors(third)] == [second, first]
    assert unchanged_ancestors(run, third) == (first, second)
    # Overwritten: its children record the old content hash.
    changed = write("b", "4", Parent("student", "a", "1"))
    assert list(run.ancestors(third)) == [
        (Parent("student", "b", "2"), changed),
        (Parent("student", "a", "1"), first),
    ]
    assert unchanged_ancestors(run, third) == ()
    # Overwritten by a product made from its own descendant.
    write("a", "5", Parent("student", "c", "3"))
    assert [found.name for _, found in run.ancestors(third)] == ["b", "a"]
    shutil.rmtree(tmp_path / "products" / "b")
    assert list(run.ancestors(third)) == []


def test_hybridize_prefers_the_stage_2_student(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    shutil.copytree(run / "products/seed", run / "products/stage2")
    file = run / "products/stage2/manifest.json"
    manifest = {**json.loads(file.read_text()), "name": "stage2", "stages": ["stage1", "stage2"]}
    file.write_text(json.dumps(manifest))
    said = mmmamba("hybridize", "--attn-layers", 1, "--run", run).stdout
    assert said.startswith("from stage2: attention in layer 0 of 5")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "questions.jsonl, line 1 is not JSON"),
        ('{"question": "What?", "image": "a.png"}', "line 1: the picture .*a.png does not exist"),
    ],
)
def test_calibration_is_read_before_anything_is_written(
    hovle_folder: Path, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(MmmambaError, match=message):
        mmmamba("seed", hovle_folder, "--run", tmp_path / "run", "--calibration", file)
    assert not (tmp_path / "run").exists()


def test_hybridize_needs_a_plan(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    message = "the recipe of seed plans no attention layers .give their number with --attn-layers"
    with pytest.raises(MmmambaError, match=message):
        mmmamba("hybridize", "--run", run)
    assert [product.name for product in (run / "products").iterdir()] == ["seed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attn-layers", 6), "layers.attention: is 6"),
        (("--layers", "0,5"), r"layers.attention\[1\]: is 5"),
        (("--layers", "a"), "expected numbers of layers"),
        (("--attn-layers", 1, "--layers", "0"), "exclude each other"),
        (("--attn-layers", 1, "--placement", "middle"), "placement"),
        (("--attn-layers", 1, "--from", "nothing"), "has no product 'nothing'"),
    ],
)
def test_layers_that_do_not_fit(
    hovle_folder: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    with pytest.raises(MmmambaError, match=message):
        mmmamba("hybridize", *words, "--run", run)
    assert list(Run(run).products()) == ["seed"]
    assert [p.name for p in (run / "products").iterdir()] == ["seed"]


def test_another_teacher_is_refused(hovle_folder: Path, tmp_path: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    seed(hovle_folder, run)
    hovle_folder.rename(moved)
    with pytest.raises(RunError, match="no longer at"):
        mmmamba("hybridize", "--attn-layers", 1, "--run", run)
    other = tmp_path / "other"
    shutil.copytree(moved, other)
    state = load_file(other / "model.safetensors")
    state["embedding_model.encoder.0.attention.wqkv.weight"] += 1
    save_file(state, other / "model.safetensors")
    with pytest.raises(RunError, match="is not the teacher of"):
        mmmamba("hybridize", "--attn-layers", 1, "--run", run, "--teacher", other)
    mmmamba("hybridize", "--attn-layers", 1, "--run", run, "--teacher", moved)
    assert "hybrid-1" in Run(run).products()


def test_second_seed_asks_first(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    mmmamba("hybridize", "--attn-layers", 1, "--run", run)
    with pytest.raises(RunError, match="--overwrite"):
        seed(hovle_folder, run)
    for words in (("--overwrite",), ("--discard",)):
        with pytest.raises(RunError, match="hybrid-1"):
            seed(hovle_folder, run, *words)
    assert list(Run(run).products()) == ["seed", "hybrid-1"]
    words = ("seed", hovle_folder, "--run", run, "--no-report", "--overwrite")
    said = mmmamba(*words, "--discard").stderr
    assert list(Run(run).products()) == ["seed"]
    assert f"removed from {run}: hybrid-1" in said
    assert "removed" not in mmmamba(*words).stderr


def test_files_beside_a_product_stop_its_replacement(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    notes = run / "products/seed/notes.txt"
    notes.write_text("mine")
    with pytest.raises(CheckpointError, match=r"did not write: notes\.txt \(move"):
        seed(hovle_folder, run, "--overwrite")
    assert notes.read_text() == "mine"
    notes.unlink()
    seed(hovle_folder, run, "--overwrite")


@pytest.mark.parametrize("where", ["here", "elsewhere.00000000"])
def test_a_product_hidden_by_a_killed_replacement(
    hovle_folder: Path, tmp_path: Path, where: str
) -> None:
    """It is restored if its process is known to be dead, and named otherwise."""
    run = tmp_path / "run"
    seed(hovle_folder, run)
    machine = atomic_writes._machine_id() if where == "here" else where
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    hidden = run / f"products/.seed.old-{machine}-{killed.pid}-0123abcd"
    (run / "products/seed").rename(hidden)
    if where == "here":
        assert mmmamba("status", "--run", run, "--json").exit_code == 0
        assert list(Run(run).products()) == ["seed"] and not hidden.exists()
        (run / "products/seed").rename(hidden)
        assert open_checkpoint(run / "products/seed").config.num_hidden_layers
        return
    assert f"kept as {hidden}" in mmmamba("status", "--run", run).stderr
    with pytest.raises(RunError, match=r"was being replaced and is kept as .*mv "):
        mmmamba("hybridize", "--attn-layers", 1, "--run", run)
    with pytest.raises(CheckpointError, match=r"was being replaced and is kept as .*mv "):
        open_checkpoint(run / "products/seed")


def test_two_commands_at_once(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    with Run(run).lock(), pytest.raises(RunError, match="in use by another"):
        mmmamba("hybridize", "--attn-layers", 1, "--run", run)


def test_interrupted_seed_leaves_nothing(
    hovle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmmamba_cli.seed.weight_transfer.initial_value", interrupt)
    done = CliRunner().invoke(app, ["seed", str(hovle_folder), "--run", str(tmp_path / "run")])
    assert done.exit_code == 130
    assert not (tmp_path / "run").exists()


def test_tied_head_is_the_language_models_table(hovle_folder: Path) -> None:
    file = hovle_folder / "config.json"
    config = json.loads(file.read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    file.write_text(json.dumps(config))
    state = load_file(hovle_folder / "model.safetensors")
    state.pop("language_model.output.weight")
    save_file(state, hovle_folder / "model.safetensors")
    model = mmmamba_cli.load(str(hovle_folder))
    table = state["language_model.model.tok_embeddings.weight"]
    assert torch.equal(model.lm_head.weight, table)
    assert not torch.equal(model.model.text_embedding.weight, table)


def test_name_map_gives_the_teacher_back(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    mmmamba("hybridize", "--attn-layers", LAYERS, "--run", run)
    teacher = open_checkpoint(hovle_folder)
    state = weights(run, f"hybrid-{LAYERS}")
    written = dict(foreign_tensors(teacher.name_map, state.__getitem__))
    expected = load_file(hovle_folder / "model.safetensors")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_report_compares_every_layer(hovle_folder: Path, tmp_path: Path) -> None:
    words = ("seed", hovle_folder, "--run", tmp_path / "run", "--dtype", "fp32", "--json")
    report = json.loads(mmmamba(*words).stdout)["fidelity"]
    assert [row["layer"] for row in report] == list(range(LAYERS))
    kept = tmp_path / "run/products/seed/fidelity.json"
    assert json.loads(kept.read_text()) == report
    assert all(-1 <= row["cosine"] <= 1 and row["relative_mse"] > 0 for row in report)


def test_status_draws_the_lineage(hovle_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seed(hovle_folder, run)
    mmmamba("hybridize", "--attn-layers", 2, "--run", run)
    drawn = mmmamba("status", "--run", run).stdout
    assert drawn.index("seed") < drawn.index("hybrid-2  <- current")
    told = json.loads(mmmamba("status", "--run", run, "--json").stdout)
    assert told["current"] == "hybrid-2" and len(told["products"]) == 2
    with pytest.raises(RunError, match="is not a run"):
        mmmamba("status", "--run", tmp_path)
