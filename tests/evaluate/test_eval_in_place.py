"""`mmmamba eval` of students of transformers' own models, beside their teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ended import Command
from families import FAMILIES, save_teacher
from suite_tables import pope_rows, write_tsv
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.evaluate.in_place_adapter import InPlaceAdapter

# A processor that needs no torchvision, and a language model.
NAMES = ("gemma3", "qwen3")
ON_CPU = ("--device", "cpu", "--max-new-tokens", 2)


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teachers, a seeded run for each of `NAMES`, and POPE with 6 questions."""
    folder = tmp_path_factory.mktemp("eval-in-place")
    for name in NAMES:
        save_teacher(FAMILIES[name], folder / "teachers" / name)
        words = ("--dtype", "fp32", "--no-report", "--in-place", "--allow-bidirectional")
        mmmamba("seed", folder / "teachers" / name, "--run", folder / name, *words)
    write_tsv(folder / "data" / "POPE.tsv", pope_rows(each=2))
    return folder


def pope(place: Path, *words: object) -> Any:
    where = ("--suite", "pope", "--data", place / "data", "--run", place / "gemma3")
    return mmmamba("eval", *where, *ON_CPU, *words)


def files(folder: Path) -> dict[str, bytes]:
    """What does not depend on when a command ran."""
    kept = ("predictions", "result")
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.name.startswith(kept)
    }


def test_student_and_teacher_in_one_command_and_the_folder_alone(
    place: Path, tmp_path: Path
) -> None:
    done = pope(place, "--teacher", "--out", tmp_path / "both", "--json")
    found = json.loads(done.stdout)
    student, teacher = found["results"]
    assert (student["model"]["kind"], teacher["model"]["kind"]) == ("linear", "teacher")
    # The processor of Gemma 3 has its own resolution.
    assert student["settings"]["max_tiles"] is None
    assert found["retention"]
    folder = place / "teachers" / "gemma3"
    pope(place, "--model", folder, "--out", tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "gemma3" / "pope" / "result.json").read_text())
    assert alone["model"]["content_hash"] == teacher["model"]["content_hash"]
    told = [
        (tmp_path / one / "pope" / "predictions.tsv") for one in ("both/teacher", "alone/gemma3")
    ]
    assert told[0].read_text() == told[1].read_text()
    by_student = (tmp_path / "both" / "seed" / "pope" / "predictions.tsv").read_text()
    assert by_student != told[0].read_text()


def test_interrupted_evaluation_resumes_with_the_same_files(
    place: Path, tmp_path: Path, mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--batch", 4, "--answers", "likelihood")
    pope(place, *words, "--out", tmp_path / "whole")
    score = InPlaceAdapter.score_choices
    asked: list[int] = []

    def interrupted(self: InPlaceAdapter, batch: Any) -> Any:
        asked.append(len(batch))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score(self, batch)

    where = ("--suite", "pope", "--data", place / "data", "--run", place / "gemma3")
    with monkeypatch.context() as patch:
        patch.setattr(InPlaceAdapter, "score_choices", interrupted)
        done = mmmamba("eval", *where, *ON_CPU, *words, "--out", tmp_path / "resumed")
    assert done.code == 130 and "4 of 6 answers to pope are kept" in done.err
    assert not list((tmp_path / "resumed").rglob("result.json"))
    pope(place, *words, "--out", tmp_path / "resumed")
    assert files(tmp_path / "whole") == files(tmp_path / "resumed")


def test_resumed_with_another_batch_size(place: Path, tmp_path: Path) -> None:
    """Killed after two answers of three; the texts of a small model in fp32 are the same."""
    pope(place, "--batch", 3, "--out", tmp_path / "whole")
    whole = files(tmp_path / "whole")
    (name,) = (name for name in whole if name.endswith(".jsonl"))
    cache = tmp_path / "resumed" / name
    cache.parent.mkdir(parents=True)
    lines = whole[name].splitlines(keepends=True)
    cache.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    done = pope(place, "--batch", 1, "--out", tmp_path / "resumed")
    assert "the last line was cut short and is dropped" in done.stderr
    resumed = files(tmp_path / "resumed")
    # Kept answers stay, and the cache has the limits of both.
    assert resumed.pop(name).startswith(b"".join(lines[:4]))
    del whole[name]
    assert resumed == whole


def test_a_limit_of_tiles_that_is_not_used_is_named(place: Path, tmp_path: Path) -> None:
    done = pope(place, "--max-tiles", 4, "--limit", 2, "--out", tmp_path)
    assert (
        "seed: --max-tiles is not used, since its processor has its own resolution" in done.stderr
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "has no processor, so it cannot be asked anything"),
        ("chat_template.jinja", "has no chat template, so a question has no format"),
    ],
)
def test_folders_without_prompts(
    place: Path, tmp_path: Path, mmmamba: Command, missing: str, message: str
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(place / "gemma3" / "products" / "seed", folder)
    (folder / missing).unlink()
    where = ["--suite", "pope", "--data", place / "data", "--out", tmp_path / "out"]
    done = mmmamba("eval", *where, *ON_CPU, "--model", folder)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and "beside it" in done.err


def test_pictures_for_a_model_of_text(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MmmambaError, match="seed reads text only"):
        pope(place, "--run", place / "qwen3", "--out", tmp_path)
    assert not list(tmp_path.rglob("result.json"))
