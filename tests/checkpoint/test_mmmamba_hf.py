"""The published mmMamba layout: golden logits, config validation, imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmmamba_hf_case import KINDS, kept_layers, released_tensors, write_released
from safetensors.torch import load_file, save_file
from small_checkpoint import SMALL_MODEL
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, RunError
from mmmamba_cli.runs import Run

TOLERANCE = 1e-4


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@torch.no_grad()
def logits_of(model: Any, case: Path) -> torch.Tensor:
    golden = load_file(case / "golden.safetensors")
    return model(golden["input.input_ids"], golden["input.pixel_values"]).logits


def expected_logits(case: Path, kind: str) -> torch.Tensor:
    word = "hybrid" if kind == "hybrid" else "linear"
    return load_file(case / "golden.safetensors")[f"stage3.{word}.logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_golden_logits_from_the_published_layout(
    golden_case: Path, tmp_path: Path, kind: str
) -> None:
    folder = write_released(tmp_path, golden_case, kind)
    logits, expected = (
        logits_of(mmmamba_cli.load(str(folder)), golden_case),
        expected_logits(golden_case, kind),
    )
    assert (logits - expected).norm() <= TOLERANCE * expected.norm()


def test_fused_and_unfused_names_are_the_same_tensors(golden_case: Path, tmp_path: Path) -> None:
    fused = open_checkpoint(write_released(tmp_path / "fused", golden_case, "linear"))
    apart = open_checkpoint(write_released(tmp_path / "apart", golden_case, "training"))
    assert fused.shapes == apart.shapes
    for name in fused.shapes:
        assert torch.equal(fused.read(name), apart.read(name)), name
    name = "model.layers.0.mixer.dt_proj.weight"
    assert "wvkqgdt" in fused.foreign_names(name)[0]
    assert apart.foreign_names(name) == ("embedding_model.encoder.0.attention.in_proj.weight",)


@pytest.mark.parametrize("architectures", ["absent", None, ["mmMambaChatModel"], "anything"])
def test_the_layout_is_detected_by_model_type(
    golden_case: Path, tmp_path: Path, architectures: Any
) -> None:
    folder = write_released(tmp_path, golden_case, "hybrid", architectures=architectures)
    if architectures == "absent":
        raw = json.loads((folder / "config.json").read_text())
        del raw["architectures"], raw["llm_config"]["architectures"]
        (folder / "config.json").write_text(json.dumps(raw))
    config = open_checkpoint(folder).config
    assert list(config.attention_layers) == kept_layers(golden_case, "hybrid")


def change(folder: Path, section: str, key: str, value: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw[section][key] = value
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("embedding_config", "layers_block_type", None, "embedding_config.layers_block_type is No"),
        ("llm_config", "layers_block_type", ["mamba2"], "for each of the 3 layers"),
        ("llm_config", "layers_block_type", "mamba2", "llm_config.layers_block_type is 'mamba2'"),
        ("llm_config", "layers_block_type", ["mha", "mamba", "mha"], r"\[1\] is 'mamba', known"),
        ("llm_config", "layers_block_type", ["mha", [1], "mha"], r"layers_block_type\[1\]"),
        ("embedding_config", "model_type", "holistic_embedding", "known is 'mmMamba_embedding'"),
        ("llm_config", "model_type", "internlm2", "known is 'mmMamba'"),
        ("llm_config", "bias", True, "llm_config.bias is True, only False"),
        ("llm_config", "hidden_size", 32, "expected them equal"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    golden_case: Path, tmp_path: Path, section: str, key: str, value: Any, said: str
) -> None:
    folder = write_released(tmp_path, golden_case, "linear")
    change(folder, section, key, value)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("conv1d.weight", (128, 1, 4), r"conv1d.weight \[128, 1, 4\] instead of \[128, 1, 2\]"),
        ("wvkqgdt.weight", (195, 64), "wvkqgdt"),
        ("dt_bias", None, "missing 1 tensors: language_model.model.layers.1.attention.dt_bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    golden_case: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, said: str
) -> None:
    folder = write_released(tmp_path, golden_case, "linear")
    tensors = released_tensors(golden_case, "linear")
    key = f"language_model.model.layers.1.attention.{name}"
    tensors.pop(key)
    if shape is not None:
        tensors[key] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


# Import into a run.


def imported(source: Path, run: Path, *words: object) -> dict[str, Any]:
    return json.loads(mmmamba("import", source, "--run", run, "--json", *words).stdout)["product"]


@pytest.mark.parametrize("kind", ["linear", "hybrid"])
def test_a_published_model_becomes_current(golden_case: Path, tmp_path: Path, kind: str) -> None:
    folder = write_released(tmp_path / "published", golden_case, kind)
    product = imported(folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.record.current == "imported" and run.record.teacher is None
    assert product["final"] and product["stages"] == ["stage1", "stage2", "stage3"]
    assert product["attention_layers"] == kept_layers(golden_case, kind)
    assert [parent["role"] for parent in product["parents"]] == ["origin"]
    assert product["parents"][0]["content_hash"] == open_checkpoint(folder).source.content_hash()
    model = mmmamba_cli.load(str(run.product_folder("imported")))
    assert torch.equal(
        logits_of(model, golden_case), logits_of(mmmamba_cli.load(str(folder)), golden_case)
    )
    assert "imported" in mmmamba("status", "--run", run.folder).stdout


def test_with_a_teacher_layers_can_be_changed(golden_case: Path, tmp_path: Path) -> None:
    folder = write_released(tmp_path / "published", golden_case, "linear")
    product = imported(folder, tmp_path / "run", "--teacher", golden_case)
    assert [parent["role"] for parent in product["parents"]] == ["origin", "teacher"]
    kept = kept_layers(golden_case, "hybrid")
    layers = ",".join(map(str, kept))
    mmmamba("hybridize", "--layers", layers, "--run", tmp_path / "run")
    run = Run(tmp_path / "run")
    run.verify_teacher(run.open_teacher())
    manifest = run.product(run.record.current)
    assert not manifest.final and manifest.stages == ("stage1", "stage2")
    logits = logits_of(mmmamba_cli.load(str(run.product_folder(manifest.name))), golden_case)
    expected = expected_logits(golden_case, "hybrid")
    assert (logits - expected).norm() <= TOLERANCE * expected.norm()


def test_without_a_teacher_commands_that_need_one_fail(golden_case: Path, tmp_path: Path) -> None:
    folder, run = write_released(tmp_path / "published", golden_case, "linear"), tmp_path / "run"
    imported(folder, run)
    with pytest.raises(RunError, match="has no teacher: its student was imported"):
        mmmamba("hybridize", "--attn-layers", "1", "--run", run)
    assert json.loads(mmmamba("status", "--run", run, "--json").stdout)["teacher"] is None


def test_a_run_keeps_its_teacher_and_refuses_another(golden_case: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mmmamba("seed", golden_case, "--run", run, "--no-report")
    folder = write_released(tmp_path / "published", golden_case, "hybrid")
    product = imported(folder, run)
    record = Run(run).record
    assert record.teacher is not None and record.current == "imported"
    assert product["parents"][1]["content_hash"] == record.teacher.content_hash
    assert list(Run(run).products()) == ["seed", "imported"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((golden_case / "config.json").read_bytes())
    tensors = load_file(golden_case / "model.safetensors")
    tensors["language_model.output.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(RunError, match="is not the teacher of"):
        imported(folder, run, "--teacher", other, "--overwrite")
    with pytest.raises(RunError, match="already has a product 'imported'"):
        imported(folder, run)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_student_of_another_teacher_is_refused(tmp_path: Path, with_teacher: bool) -> None:
    golden = Path(__file__).parents[1] / "golden"
    folder = write_released(tmp_path / "published", golden / "hovle_pre", "linear")
    words = ["--teacher", golden / "hovle_post"] if with_teacher else []
    if not with_teacher:
        mmmamba("seed", golden / "hovle_post", "--run", tmp_path / "run", "--no-report")
    with pytest.raises(CheckpointError, match=r"was not made from .*: vision is"):
        imported(folder, tmp_path / "run", *words)
    assert "imported" not in Run(tmp_path / "run").products()


def test_teacher_and_student_are_not_taken_for_each_other(
    golden_case: Path, tmp_path: Path
) -> None:
    folder = write_released(tmp_path / "published", golden_case, "linear")
    with pytest.raises(CheckpointError, match=r"student already: `mmmamba import`"):
        mmmamba("seed", folder, "--run", tmp_path / "run", "--no-report")
    with pytest.raises(CheckpointError, match=r"no student.*`mmmamba seed "):
        imported(golden_case, tmp_path / "run")
    with pytest.raises(CheckpointError, match="is not a teacher"):
        imported(folder, tmp_path / "run", "--teacher", folder)
    assert not (tmp_path / "run").exists()


def test_a_product_brings_its_manifest_along(golden_case: Path, tmp_path: Path) -> None:
    mmmamba("seed", golden_case, "--run", tmp_path / "a", "--no-report")
    product = imported(tmp_path / "a/products/seed", tmp_path / "b", "--name", "theirs")
    assert not product["final"] and product["stages"] == [] and product["name"] == "theirs"
    assert product["content_hash"] == Run(tmp_path / "a").product("seed").content_hash
    assert product["recipe"] == Run(tmp_path / "a").product("seed").recipe
    (tmp_path / "a/products/seed/manifest.json").unlink()
    product = imported(tmp_path / "a/products/seed", tmp_path / "c")
    assert not product["final"] and "not known" in product["notes"][0]


@pytest.mark.parametrize("name", ["", "../out", ".hidden", "a/b"])
def test_invalid_product_names_are_refused(golden_case: Path, tmp_path: Path, name: str) -> None:
    folder = write_released(tmp_path / "published", golden_case, "linear")
    with pytest.raises(RunError, match="cannot be a product's name"):
        imported(folder, tmp_path / "run", "--name", name)
    assert not (tmp_path / "run").exists()


def test_nan_stops_the_import(golden_case: Path, tmp_path: Path) -> None:
    folder = write_released(tmp_path / "published", golden_case, "linear")
    tensors = released_tensors(golden_case, "linear")
    tensors["embedding_model.encoder.1.attention.wvkqgdt.weight"][150, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder.1.attention.wvkqgdt.* holds 1 NaN"):
        imported(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    from suite_tables import pope_rows, write_tsv

    write_tsv(tmp_path / "data" / "POPE.tsv", pope_rows())
    return tmp_path / "data"


def test_eval_of_a_published_model(questions: Path, tmp_path: Path) -> None:
    """`mmmamba eval --model` with a HoVLE tokenizer."""
    from test_as_a_new_user import write_teacher

    from mmmamba_cli.checkpoint import mmmamba_hf
    from mmmamba_cli.model import LINEAR

    folder = write_teacher(tmp_path / "published")
    (folder / "hovle.ckpt").unlink()
    raw = json.loads((folder / "config.json").read_text())
    raw["model_type"] = "mmMamba_chat"
    raw["embedding_config"] |= {"model_type": "mmMamba_embedding"}
    raw["embedding_config"]["layers_block_type"] = ["mamba2", "mha"]
    raw["llm_config"]["layers_block_type"] = ["mamba2"] * 6
    (folder / "config.json").write_text(json.dumps(raw))
    config = mmmamba_hf.to_config(raw)
    assert config.layer_types.count(LINEAR) == 7
    rng = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=rng) / 6
        for mapping in mmmamba_hf.name_map(raw, config)
        for name, shape in mapping.foreign.items()
    }
    save_file(state, folder / "model.safetensors")
    assert (folder / "tokenizer.model").read_bytes() == SMALL_MODEL.read_bytes()
    words = ["--suite", "pope", "--data", questions, "--out", tmp_path / "out", "--json"]
    words += ["--max-new-tokens", "2", "--limit", "1", "--device", "cpu"]
    found = json.loads(mmmamba("eval", "--model", folder, *words).stdout)
    assert "pope" in json.dumps(found).lower()
