"""The model card of an export: lineage, recipe, licence, scores, and no local paths."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from exported_runs import CASE, mmmamba
from mmmamba_hf_case import write_released
from small_language_models import write, write_tokenizer
from test_as_a_new_user import write_teacher

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.export import CardInfo, CardScore, export_checkpoint
from mmmamba_cli.recipe.yaml_text import read_yaml, write_yaml
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.manifest import command_line
from mmmamba_cli.runs.provenance import redact_command, redact_path, redact_recipe, redact_text


def card(run: Path, out: Path, *words: object) -> str:
    mmmamba("export", "--run", run, "--format", "hub", "--out", out, "--overwrite", *words)
    return (out / "README.md").read_text()


def test_the_card_tells_lineage_recipe_and_what_was_not_done(run: Path, tmp_path: Path) -> None:
    text = card(run, tmp_path / "out")
    manifests = Run(run).products()
    for name in ("seed", "hybrid-2"):
        assert f"- {name}: " in text and manifests[name].content_hash[:12] in text
    teacher = Run(run).teacher
    assert f"- teacher: hovle_pre (`{teacher.content_hash[:12]}`)" in text
    assert "**This model was never distilled end to end**" in text and "Stages done: none" in text
    assert "  attention: 2\n" in text and "conv_width: 2" in text
    assert "attention in layers 0, 2 of 5" in text
    assert "license" not in text and "\n## Scores" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmmamba", "arxiv:2502.13145"],
    }


def test_the_card_takes_a_licence_and_a_title(run: Path, tmp_path: Path) -> None:
    text = card(run, tmp_path / "out", "--license", "apache-2.0", "--title", "My model")
    assert "\nlicense: apache-2.0\n" in text and "\n# My model\n" in text


@pytest.mark.parametrize("licence", ["mit\nbad: 1", "a: b", "", "-"])
def test_a_licence_that_would_break_the_card_is_refused(
    run: Path, tmp_path: Path, licence: str
) -> None:
    with pytest.raises(CheckpointError, match="is no name of a licence"):
        card(run, tmp_path / "out", "--license", licence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pictures", "words"])
def test_local_paths_are_redacted(tmp_path: Path, kind: str) -> None:
    """Every text in the hub folder except code and vocabulary."""
    place = tmp_path / "secret-place"
    if kind == "pictures":
        write_teacher(place / "teacher")
        teacher = place / "teacher/hovle.ckpt"
    else:
        write(place / "teacher", "Llama", {})
        write_tokenizer(place / "teacher")
        teacher = place / "teacher"
    raw = json.loads((place / "teacher/config.json").read_text())
    raw["_name_or_path"] = str(place)
    (place / "teacher/config.json").write_text(json.dumps(raw))
    mmmamba("seed", teacher, "--run", place / "run", "--no-report")
    text = card(place / "run", tmp_path / "out")
    assert "teacher: " in text
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".json", ".md", ".jinja"):
            text = file.read_text()
            assert "secret-place" not in text and str(tmp_path) not in text, file


def test_redact_path_and_recipe() -> None:
    assert redact_path("/home/someone/models/hovle.ckpt") == "hovle.ckpt"
    assert redact_path("~/models/hovle") == "hovle" and redact_path("../x/y") == "y"
    cached = "/c/hub/models--some--model/snapshots/0123456789abcdef0123456789abcdef01234567"
    assert redact_path(cached) == "some/model@0123456789ab"
    assert redact_path("some/model") == "some/model"
    assert redact_path("--out=/home/someone/x") == "--out=x"
    text = "teacher: /home/someone/hovle\ndata:\n  train: ~/secret/train.jsonl\nlr: 1e-3\n"
    assert redact_recipe(text) == "teacher: hovle\ndata:\n  train: train.jsonl\nlr: 0.001\n"


def test_redact_nested_values() -> None:
    long = "/home/someone/a folder/" + "x" * 120 + "/train: all.jsonl"
    text = write_yaml(
        {
            "description": "as in /home/someone/notes.md, see https://host/home/x",
            "data": {"train": [long, "~/b: c/d.tar"], "image_root": "C:\\Users\\me\\images"},
        }
    )
    found = redact_recipe(text)
    assert "someone" not in found and "Users" not in found and "b: c" not in found
    data = read_yaml(found, "it")["data"]
    assert data == {"train": ["train: all.jsonl", "d.tar"], "image_root": "images"}
    command = shlex.join(["mmmamba", "distill", "--data", "/home/me/a b/t.jsonl", "--set", "x=1"])
    assert redact_command(command) == "mmmamba distill --data t.jsonl --set x=1"
    assert redact_command("mmmamba seed /home/me/isn't/x") == "mmmamba seed x"
    assert redact_text("imported: '/home/me/x y.txt' of and/or") == "imported: 'x y.txt' of and/or"
    assert redact_text("the file /home/me/x.json: is damaged") == "the file x.json: is damaged"


def test_command_line_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/mmmamba", "seed", "my model", "--set", "description=it's $HOME"]
    monkeypatch.setattr(sys, "argv", words)
    assert shlex.split(command_line()) == ["mmmamba", *words[1:]]


def test_base_model_is_a_hub_teacher(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    teacher = tmp_path / f"hub/models--some--model/snapshots/{commit}"
    shutil.copytree(CASE, teacher)
    run = tmp_path / "run"
    mmmamba("seed", teacher, "--run", run, "--no-report")
    front = yaml.safe_load(card(run, tmp_path / "out").split("---\n")[1])
    assert front["base_model"] == "some/model"
    text = card(run, tmp_path / "out", "--base-model", "other/model")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "other/model"
    with pytest.raises(CheckpointError, match="'nameless' is no repository"):
        card(run, tmp_path / "out", "--base-model", "nameless")


def test_card_scores_of_the_product(run: Path, tmp_path: Path) -> None:
    from mmmamba_cli.evaluate.result import DataInfo, ModelInfo, Result, RuleResult, json_text

    def write(name: str, content_hash: str, value: float, used: int = 10) -> None:
        part = RuleResult(
            rule="kit",
            scoring="yes-no",
            metric="accuracy",
            metrics={"accuracy": value},
            intervals={"accuracy": (value - 1, value + 1)},
            counts={},
            categories={},
        )
        result = Result(
            suite="pope",
            title="POPE",
            version=1,
            suite_digest="0",
            data=DataInfo(file="POPE.tsv", sha256="0", rows=20, used=used),
            model=ModelInfo(name=name, content_hash=content_hash),
            settings={},
            rules=(part,),
            seed=0,
            versions={},
        )
        (run / "evals" / name).mkdir(parents=True, exist_ok=True)
        (run / "evals" / name / "result.json").write_text(json_text(result))

    write("hybrid-2", Run(run).product("hybrid-2").content_hash, 85.25)
    write("seed", Run(run).product("seed").content_hash, 11.5)
    text = card(run, tmp_path / "out")
    row = "| POPE | kit | accuracy | 85.25 (84.25 to 86.25) | 10, a part |"
    assert row in text and "11.5" not in text and "95% intervals" in text
    assert "model-index" not in text  # partial suites are not in the metadata
    write("teacher", Run(run).teacher.content_hash, 91.5, used=20)
    text = card(run, tmp_path / "out")
    assert row in text and "91.5" not in text  # other questions
    write("hybrid-2", Run(run).product("hybrid-2").content_hash, 85.25, used=20)
    text = card(run, tmp_path / "out")
    assert "| POPE | kit | accuracy | 85.25 (84.25 to 86.25) | 91.5 | 20 |" in text
    (model,) = yaml.safe_load(text.split("---\n")[1])["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "POPE", "type": "pope"}
    assert result["metrics"] == [
        {"type": "accuracy", "value": 85.25, "name": "accuracy by the rule kit"}
    ]
    # Results of another kit in the same folder.
    (run / "evals" / "hybrid-2" / "lm-eval").mkdir()
    (run / "evals" / "hybrid-2" / "lm-eval" / "result.json").write_text('{"kit": "lm-eval"}')
    done = mmmamba("export", "--run", run, "--format", "hub", "--out", tmp_path / "more")
    assert "lm-eval/result.json has the scores of lm-eval" in done.stderr
    row = "| POPE | kit | accuracy | 85.25 (84.25 to 86.25) | 91.5 | 20 |"
    assert row in (tmp_path / "more" / "README.md").read_text()


def test_card_of_a_final_product(tmp_path: Path) -> None:
    folder = write_released(tmp_path / "in", CASE, "linear")
    mmmamba("import", folder, "--run", tmp_path / "run")
    text = card(tmp_path / "run", tmp_path / "out")
    assert "never distilled" not in text and "published as distilled end to end" in text
    assert "A linear model: Mamba-2 in all 5 layers" in text and "- origin: in (" in text
    found = export_checkpoint(
        open_checkpoint(folder),
        "mmmamba-hf",
        tmp_path / "direct",
        card=CardInfo(scores=(CardScore("MME", "kit", "total", 1300.0, 14),)),
    )
    text = (found.folder / "README.md").read_text()
    assert "published as distilled end to end, which was not checked" in text
    assert "| MME | kit | total | 1300 | 14 |" in text and "intervals" not in text
