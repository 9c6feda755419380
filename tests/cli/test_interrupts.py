"""Ctrl-C in commands that write once: the message about what is left and how to continue."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from ended import Command


def interrupt(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


def said(mmmamba: Command, *words: object) -> str:
    done = mmmamba(*words)
    assert (done.code, done.out) == (130, ""), done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("interrupted: ")]
    assert "Traceback" not in done.err
    return line.removeprefix("interrupted: ")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_seed(
    mmmamba: Command, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mmmamba_cli.seed.weight_transfer.initial_value", interrupt)
        line = said(mmmamba, "seed", llama, "--run", run)
    assert line == f"nothing was written to {run}; repeat the command"
    assert not [file for file in files(run) if file.suffix in (".json", ".safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr("mmmamba_cli.seed.measure_fidelity", interrupt)
        line = said(mmmamba, "seed", llama, "--run", run)
    assert line.startswith(f"the seed is complete in {run / 'products' / 'seed'}")
    assert mmmamba("status", "--run", run).code == 0


def test_export_and_profile(
    mmmamba: Command, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words: tuple[object, ...] = ("--run", student_run, "--format", "hub", "--out")
    with monkeypatch.context() as patch:
        patch.setattr("mmmamba_cli.export.export_checkpoint", interrupt)
        line = said(mmmamba, "export", *words, out)
    assert line == f"nothing was written to {out}; repeat the command"
    assert not out.exists()
    monkeypatch.setattr("mmmamba_cli.export.push_to_hub", interrupt)
    line = said(mmmamba, "export", *words, tmp_path / "hub", "--push", "someone/model")
    assert line.startswith(f"the export in {tmp_path / 'hub'} is complete, its upload may not be")
    assert (tmp_path / "hub" / "config.json").is_file()
    monkeypatch.setattr("mmmamba_cli.profiling.profile", interrupt)
    words = ("--run", student_run, "--contexts", "8", "--device", "cpu", "--out", out)
    line = said(mmmamba, "profile", *words)
    assert line.startswith(f"nothing was written to {out}: a profile is written once all is")
    assert not out.exists()


def test_hybridize_and_import(
    mmmamba: Command,
    student_run: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files(student_run)
    monkeypatch.setattr("mmmamba_cli.hybridize.hybridize", interrupt)
    line = said(mmmamba, "hybridize", "--run", student_run, "--layers", "0")
    assert line == f"no product was written to {student_run}; repeat the command"
    assert files(student_run) == before
    monkeypatch.setattr("mmmamba_cli.seed.import_student.import_student", interrupt)
    line = said(mmmamba, "import", llama, "--run", tmp_path / "run")
    assert line == f"nothing was written to {tmp_path / 'run'}; repeat the command"


def test_scenes_build(mmmamba: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmmamba_evals.scenes import scene_writers

    monkeypatch.setattr(scene_writers, "write_lessons", interrupt)
    words = ("--out", tmp_path / "out", "--pictures", 1, "--lessons", 1)
    line = said(mmmamba, "scenes", "build", *words)
    assert line == f"nothing was written to {tmp_path / 'out'}; repeat the command"
    assert list(tmp_path.iterdir()) == []
