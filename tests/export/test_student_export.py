"""`mmmamba export` of students of other teachers: files, card, licence, dtypes, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import kill_points
import pytest
import torch
import yaml
from exported_students import inputs_of, save_student
from families import FAMILIES, save_teacher
from preloaded_process import PreloadedProcess
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.checkpoint import open_any_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, MmmambaError, RunError
from mmmamba_cli.export import exporter
from mmmamba_cli.export.teacher_licence import TeacherLicence, find_licence
from mmmamba_cli.runs import Run
from mmmamba_cli.teachers import StudentPlan

NAME, WEIGHTS = "qwen3_vl", "model.safetensors"
CARD = "---\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE.txt\n---\n# Teacher\n"


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher that has a licence, a run seeded from it, and a saved student."""
    folder = tmp_path_factory.mktemp("made")
    save_teacher(FAMILIES[NAME], folder / "teacher")
    (folder / "teacher/README.md").write_text(CARD)
    (folder / "teacher/LICENSE.txt").write_text("You may.\n")
    words = ("--run", folder / "run", "--dtype", "fp32", "--no-report")
    mmmamba("seed", folder / "teacher", *words)
    save_student(NAME, "hybrid gated_delta", folder / "saved")
    return folder


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    """A copy of the saved student, to be damaged."""
    return Path(shutil.copytree(made / "saved", tmp_path / "saved"))


def export(out: Path, *words: object) -> Any:
    return mmmamba("export", "--format", "hub", "--out", out, *words)


def fields_of(out: Path) -> dict[str, Any]:
    """The YAML at the head of a card."""
    return dict(yaml.safe_load((out / "README.md").read_text().split("---\n")[1]))


@torch.no_grad()
def test_a_product_with_its_manifest_card_and_licence(made: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "out", made / "run"
    done = export(out, "--run", run, "--json")
    found = json.loads(done.stdout)
    assert "never distilled end to end" in done.stderr and "has no" not in done.stderr
    product = Run(run).product("seed")
    assert found["content_hash"] == product.content_hash
    assert json.loads((out / "manifest.json").read_text())["stages"] == []
    assert str(made) not in "".join(file.read_text() for file in out.glob("*.json"))
    text, fields = (out / "README.md").read_text(), fields_of(out)
    assert fields["license"] == "other" and fields["license_name"] == "its-own"
    assert fields["pipeline_tag"] == "image-text-to-text"
    assert "A linear model: Mamba-2 in all 4 layers." in text
    assert "Qwen3VLForConditionalGeneration" in text and "trust_remote_code=True" in text
    assert "The teacher's license is its-own. Its files: `LICENSE.txt`." in text
    assert "## Lineage" in text and "## Recipe" in text and str(made) not in text
    assert (out / "LICENSE.txt").read_text() == "You may.\n"
    config = json.loads((out / "config.json").read_text())
    assert StudentPlan.from_json(config["mmmamba"]) == open_any_checkpoint(out).plan
    inputs = inputs_of(FAMILIES[NAME])
    models = [mmmamba_cli.load(str(path)) for path in (run / "products/seed", out)]
    one, two = (model(**inputs).logits for model in models)
    assert torch.equal(one, two)


def test_an_export_is_exported_again_with_the_same_card(made: Path, tmp_path: Path) -> None:
    export(tmp_path / "one", "--run", made / "run")
    export(tmp_path / "two", "--model", tmp_path / "one", "--title", "one")
    one, two = tmp_path / "one", tmp_path / "two"
    assert fields_of(one)["license_name"] == fields_of(two)["license_name"]
    names = {file.name for file in one.iterdir()}
    assert names == {file.name for file in two.iterdir()}
    for name in names - {"README.md", "mmmamba_export.json", "manifest.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_bf16_keeps_small_parameters_in_fp32(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["dtype"] = "float32"
    (saved / "config.json").write_text(json.dumps(config))
    export(out, "--model", saved, "--dtype", "bf16", "--license", "apache-2.0")
    small = open_any_checkpoint(out).plan.fp32_parameters
    dtypes = {name: tensor.dtype for name, tensor in load_file(out / WEIGHTS).items()}
    for name, dtype in dtypes.items():
        is_small = not small.isdisjoint(name.split("."))
        assert dtype == (torch.float32 if is_small else torch.bfloat16), name
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert fields_of(out)["license"] == "apache-2.0"
    assert "How far it was distilled is not known." in (out / "README.md").read_text()
    assert mmmamba_cli.load(str(out)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["mmmamba-hf", "hovle"])
def test_layouts_of_other_models_are_refused(made: Path, tmp_path: Path, form: str) -> None:
    words = ("--run", made / "run", "--format", form, "--out", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"model_type mmmamba_qwen3_vl .--format hub holds"):
        mmmamba("export", *words)
    assert not (tmp_path / "out").exists()


def _under_the_teachers_type(saved: Path) -> None:
    file = saved / "config.json"
    file.write_text(file.read_text().replace("mmmamba_qwen3_vl", "qwen3_vl"))


def _without_a_tensor(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    del tensors["model.language_model.layers.0.self_attn.A_log"]
    save_file(tensors, saved / WEIGHTS)


def _with_nan(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    tensors["lm_head.weight"][0, 0] = torch.nan
    save_file(tensors, saved / WEIGHTS)


def _with_a_damaged_tokenizer(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_under_the_teachers_type, "would load the teacher's class and drop the mixers"),
        (_without_a_tensor, r"missing 1 tensors: model\S+0.self_attn.A_log"),
        (_with_nan, "'lm_head.weight' holds 1 NaN"),
        (_with_a_damaged_tokenizer, "the tokenizer of .* cannot be read"),
    ],
)
def test_a_damaged_student_is_refused(saved: Path, tmp_path: Path, damage: Any, said: str) -> None:
    damage(saved)
    with pytest.raises(MmmambaError, match=said):
        export(tmp_path / "out", "--model", saved)
    assert not (tmp_path / "out").exists()


def test_a_teacher_and_a_changed_product_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a teacher of model_type qwen3_vl, not a student"):
        export(tmp_path / "out", "--model", made / "teacher")
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    tensors = load_file(run / "products/seed" / WEIGHTS)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, run / "products/seed" / WEIGHTS)
    with pytest.raises(RunError, match="was changed since it was written"):
        export(tmp_path / "out", "--run", run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["student_card_text", "write_student_files", "write_record"])
def test_a_full_disk_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, place, fail)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "new/out", "--model", made / "saved")
    assert not (tmp_path / "new").exists()


def test_kills_leave_the_old_export_or_the_new_one(made: Path, tmp_path: Path) -> None:
    """SIGKILL while weights and card are written, and at both renames of a replacement."""
    out, undisturbed = tmp_path / "work/out", tmp_path / "undisturbed"
    words = ("--model", made / "saved", "--dtype", "bf16", "--title", "one")
    export(undisturbed, *words)
    export(out, *words[:2])
    places = [["open", WEIGHTS, 1], ["open", "README.md", 1]]
    places += [["os.rename", f"{out} ->", 1], ["os.rename", f"-> {out}", 1]]
    command = ["export", "--format", "hub", "--out", out, "--overwrite", *words]
    settings = {"words": list(map(str, command)), "folder": str(out.parent), "kills": places}
    report = tmp_path / "report"
    arguments = [json.dumps(settings), str(report)]
    process = PreloadedProcess(kill_points.run, arguments, tmp_path / "output")
    assert process.wait() == 0, process.text()
    starts = [json.loads(line) for line in report.read_text().splitlines()]
    assert ["killed" in start for start in starts] == [True] * 4 + [False], process.text()
    assert starts[-1]["exit"] == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    names = {file.name for file in undisturbed.iterdir()}
    assert names == {file.name for file in out.iterdir()}
    for name in names:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_what_is_missing_for_prompts_is_said(saved: Path, tmp_path: Path) -> None:
    (saved / "processor_config.json").unlink()
    done = export(tmp_path / "one", "--model", saved)
    assert "has no processor: the export has none either" in done.stderr.replace("\n", " ")
    for file in saved.glob("tokenizer*"):
        file.unlink()
    done = export(tmp_path / "two", "--model", saved)
    assert "has no tokenizer: the export has none either" in done.stderr.replace("\n", " ")


def test_local_names_of_a_folder_are_dropped(saved: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        value = json.loads((saved / name).read_text())
        (saved / name).write_text(json.dumps(value | {"_name_or_path": "/secret/place"}))
    export(tmp_path / "out", "--model", saved)
    for name in ("config.json", "tokenizer_config.json"):
        assert "secret" not in (tmp_path / "out" / name).read_text()


def test_the_tokenizer_is_of_the_class_that_the_teacher_gets(tmp_path: Path) -> None:
    """The class in tokenizer_config.json is not believed for SmolVLM, and splits no digits."""
    save_student("smolvlm", "hybrid mamba2", tmp_path / "saved")
    file = tmp_path / "saved/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    file = tmp_path / "saved/tokenizer.json"
    value = json.loads(file.read_text())
    assert "Digits" not in json.dumps(value["pre_tokenizer"])
    value["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, value["pre_tokenizer"]],
    }
    file.write_text(json.dumps(value))
    config = AutoConfig.for_model("smolvlm")
    teacher = AutoTokenizer.from_pretrained(tmp_path / "saved", config=config)
    export(tmp_path / "out", "--model", tmp_path / "saved")
    student = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(student) is type(teacher)
    assert student.tokenize("1234 5") == teacher.tokenize("1234 5")


@pytest.mark.parametrize(
    ("card", "found"),
    [
        (CARD, ("other", "its-own", "LICENSE.txt")),
        ("---\nlicense: mit\n---\n", ("mit", None, None)),
        ("---\nlicense: [mit, gpl]\n---\n", (None, None, None)),
        ("---\nlicense: {\n---\n", (None, None, None)),
        ("# no head\n", (None, None, None)),
    ],
)
def test_the_licence_that_a_card_names(
    tmp_path: Path, card: str, found: tuple[str | None, ...]
) -> None:
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "NOTICE").write_text("")
    (tmp_path / "licenses").mkdir()
    expected = TeacherLicence(*found, files=(tmp_path / "NOTICE",))
    assert find_licence([tmp_path / "nowhere", tmp_path]) == expected
