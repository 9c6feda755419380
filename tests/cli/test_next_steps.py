"""The commands that a command names as next ones are accepted, and the short ones run."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_lines import problem_of
from ended import Command, Done
from test_as_a_new_user import write_teacher

from mmmamba_cli.cli import distill
from mmmamba_cli.cli.next_steps import NextSteps, command_line, free_folder
from mmmamba_cli.runs import Run

HYBRID = "or a hybrid first: "


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, whose name is to be quoted, without tables of other suites."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LMUData", str(folder / "none"))
    monkeypatch.delenv("MMMAMBA_RUN", raising=False)
    return folder


def accepted(done: Done) -> list[list[str]]:
    """The commands after `next:` and the hybrid, each accepted by the command line."""
    assert done.code == 0, done.err
    found = []
    lines = done.out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("next: "))
    for line in lines[first:]:
        text = line.removeprefix("next: ").removeprefix(HYBRID).strip()
        if text.startswith("mmmamba "):
            words = shlex.split(text)[1:]
            assert problem_of(words) is None, text
            found.append(words)
    return found


def placeholders(done: Done) -> set[str]:
    return {line.partition(":")[0] for line in done.out.splitlines() if line[:4].isupper()}


def test_the_shipped_teacher_to_the_end(
    mmmamba: Command, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is what the one before printed; training itself is left out."""
    (empty_folder / "scenes").mkdir()
    (empty_folder / "scenes" / "lessons.jsonl").touch()
    run = ["--run", "a run"]
    seeded = mmmamba("seed", "scenes-teacher", "--no-report", *run, "--recipe", "scenes-demo")
    (train,) = accepted(seeded)
    assert train == ["distill", "--data", "scenes/lessons.jsonl", *run]

    def after(stages: tuple[str, ...], *options: str) -> list[list[str]]:
        product = Run(Path("a run")).product("seed")
        recipe = product.recipe.replace("train: null", "train: scenes/lessons.jsonl")
        made = {"stages": stages, "final": len(stages) == 3, "recipe": recipe}
        monkeypatch.setattr(distill, "train", lambda job: [product.model_copy(update=made)])
        return accepted(mmmamba("distill", *options, *run))

    assert after(("stage1",)) == [["distill", *run]]
    assert after(("stage1", "stage2"), "--device", "cpu") == [
        ["distill", "--device", "cpu", *run],
        ["hybridize", "--attn-layers", "2", *run],
    ]
    assert after(("stage1", "stage2", "stage3")) == [
        ["eval", "--suite", "scenes", "--teacher", *run]
    ]
    hybridized = mmmamba("hybridize", "--attn-layers", "2", *run)
    assert accepted(hybridized) == [train]


def test_without_lessons_they_are_drawn_first(mmmamba: Command, empty_folder: Path) -> None:
    seeded = mmmamba("seed", "scenes-teacher", "--no-report")
    assert accepted(seeded) == [
        ["scenes", "build", "--out", "scenes"],
        # The stages of the default recipe would take weeks on a CPU.
        ["distill", "--data", "scenes/lessons.jsonl", "--recipe", "scenes-demo"],
    ]
    (empty_folder / "scenes").mkdir()
    again = mmmamba("seed", "scenes-teacher", "--no-report", "--overwrite")
    assert accepted(again)[0] == ["scenes", "build", "--out", "scenes-2"]


def test_other_mixers_keep_their_recipe(mmmamba: Command) -> None:
    kind = ["--set", "mixer.kind=gated_delta"]
    seeded = mmmamba("seed", "scenes-teacher", "--no-report", *kind)
    assert accepted(seeded)[1] == ["distill", "--data", "scenes/lessons.jsonl"]


def test_a_teacher_of_ones_own_needs_a_file(
    mmmamba: Command, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_teacher(empty_folder)
    monkeypatch.setenv("MMMAMBA_RUN", "environment")
    seeded = mmmamba("seed", "hovle.ckpt", "--no-report")
    assert accepted(seeded) == [["distill", "--data", "FILE"]]
    assert placeholders(seeded) == {"FILE"}
    (empty_folder / "hovle.ckpt").rename("moved.ckpt")
    moved = ["--teacher", "moved.ckpt"]
    hybrid = mmmamba("hybridize", "--attn-layers", "1", *moved)
    assert accepted(hybrid) == [["distill", "--data", "FILE", *moved]]


def test_imported_students(mmmamba: Command, empty_folder: Path) -> None:
    alone = mmmamba("import", "scenes-linear")
    assert accepted(alone) == [["eval", "--suite", "scenes"]]
    with_teacher = mmmamba("import", "scenes-linear", "--run", "b", "--teacher", "scenes-teacher")
    assert accepted(with_teacher) == [["eval", "--suite", "scenes", "--teacher", "--run", "b"]]


def test_an_exported_model_is_asked(mmmamba: Command, empty_folder: Path) -> None:
    done = mmmamba("export", "--model", "scenes-linear", "--format", "hub", "--out", "an export")
    assert accepted(done) == [["chat", "--model", "an export"]]


def test_students_of_other_teachers_are_evaluated_on_tables(
    mmmamba: Command, empty_folder: Path, student_run: Path
) -> None:
    product = student_run / "products" / "seed"
    manifest = (product / "manifest.json").read_text()
    copy = empty_folder / "student"
    copy.mkdir()
    for file in product.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert '"final": false' in manifest
    (copy / "manifest.json").write_text(manifest.replace('"final": false', '"final": true'))
    imported = mmmamba("import", copy)
    assert accepted(imported) == [["eval", "--suite", "mme,pope", "--data", "DIR"]]
    assert placeholders(imported) == {"DIR"}
    (empty_folder / "none").mkdir()
    (empty_folder / "none" / "POPE.tsv").touch()
    again = mmmamba("import", copy, "--overwrite")
    assert accepted(again) == [["eval", "--suite", "pope"]]


def test_drawn_scenes(mmmamba: Command, empty_folder: Path) -> None:
    few = ["scenes", "build", "--pictures", "1", "--lessons", "1", "--short", "--out"]
    alone = mmmamba(*few, "a b")
    assert accepted(alone) == [
        ["eval", "--suite", "scenes", "--data", "a b", "--model", "scenes-linear"]
    ]
    mmmamba("seed", "scenes-teacher", "--no-report", "--recipe", "scenes-demo")
    seeded = mmmamba(*few, "c")
    assert accepted(seeded) == [["distill", "--data", "c/lessons.jsonl"]]
    mmmamba("import", "scenes-linear")
    imported = mmmamba(*few, "d")
    assert accepted(imported) == [["eval", "--suite", "scenes", "--data", "d", "--teacher"]]


def test_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    NextSteps(("one", "two"), ("X: three",)).print()
    assert capsys.readouterr().out == "next: one\n      two\nX: three\n"
    assert command_line("chat", run=Path("it's")) == "mmmamba chat --run 'it'\"'\"'s'"
    assert command_line("chat", run=Path("runs/default")) == "mmmamba chat"
    for name in ("f", "f-2"):
        assert free_folder(tmp_path / "f") == tmp_path / name
        (tmp_path / name).mkdir()
