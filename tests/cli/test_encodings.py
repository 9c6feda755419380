"""Names in other scripts on streams that are not UTF-8: escaped, never a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from ended import Command

from mmmamba_cli.cli import main
from mmmamba_cli.errors import RunError
from mmmamba_cli.runs import Run

ROOT = Path(__file__).parents[2]
NAME = "图片-größe-😀"
ENCODINGS = ("ascii", "cp1252", "utf-8", "latin-1", "shift_jis")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, student_run: Path) -> Path:
    """A run, a recipe and data with names in other scripts."""
    home = tmp_path_factory.mktemp("encodings")
    shutil.copytree(student_run, home / NAME)
    text = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8")
    recipe = {**yaml.safe_load(text), "description": NAME}
    (home / f"{NAME}.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    turns = [{"from": "human", "value": "<image>\n你好"}, {"from": "gpt", "value": "好"}]
    sample = {"image": f"{NAME}.png", "conversations": turns}
    line = json.dumps(sample, ensure_ascii=False)
    (home / f"{NAME}.jsonl").write_text(f"{line}\n", encoding="utf-8")
    return home


# Exit code and words. {name} is the name of the run folder, recipe and data file.
COMMANDS = {
    "status": (0, ["status", "--run", "{name}"]),
    "inspect": (0, ["inspect", "--run", "{name}"]),
    "recipe show": (0, ["recipe", "show", "{name}.yaml"]),
    "recipe validate": (0, ["recipe", "validate", "{name}.yaml"]),
    "report": (0, ["report", "--run", "{name}", "--title", NAME]),
    "data check": (2, ["data", "check", "{name}.jsonl", "--model", "scenes-teacher"]),
    "no such run": (2, ["status", "--run", "{name}-gone"]),
    "no such checkpoint": (2, ["inspect", "{name}-gone"]),
    "no such recipe": (2, ["recipe", "show", "{name}-gone"]),
    "no such command": (2, ["{name}"]),
    "no such option": (2, ["status", "--{name}"]),
    "help": (0, ["seed", "--help"]),
}


def run(folder: Path, encoding: str, words: list[str]) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "mmmamba_cli", *words],
        cwd=folder,
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": encoding,
            "OMP_NUM_THREADS": "1",
        },
    )
    return done.returncode, done.stdout, done.stderr


def run_in_process(folder: Path, encoding: str, words: list[str]) -> tuple[int, bytes, bytes]:
    """The same in this process, which has imported torch already."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in "oe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["mmmamba", *words])
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    for stream in (out, err):
        stream.flush()
    return int(ended.value.code or 0), out.buffer.getvalue(), err.buffer.getvalue()


def runner(encoding: str) -> Callable[[Path, str, list[str]], tuple[int, bytes, bytes]]:
    """A process of its own for each command in ascii; other encodings take the same path."""
    return run if encoding == "ascii" else run_in_process


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_fails_on_an_unencodable_name(name: str, encoding: str, folder: Path) -> None:
    code, words = COMMANDS[name]
    words = [word.format(name=NAME) for word in words]
    ended, out, err = runner(encoding)(folder, encoding, words)
    assert ended == code, err.decode(encoding, errors="replace")
    # The output decodes in the requested encoding.
    out.decode(encoding)
    assert b"Traceback" not in err
    assert b"UnicodeEncodeError" not in err


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["status", "recipe show", "data check", "no such run"])
def test_json_is_valid_in_every_encoding(name: str, encoding: str, folder: Path) -> None:
    code, words = COMMANDS[name]
    words = [word.format(name=NAME) for word in words]
    # The process that imports torch is that of the test above.
    call = run_in_process if name == "data check" else runner(encoding)
    ended, out, err = call(folder, encoding, [*words, "--json"])
    assert ended == code, err.decode(encoding, errors="replace")
    found = json.loads(out.decode(encoding))
    assert NAME in json.dumps(found, ensure_ascii=False)


@pytest.mark.parametrize("name", ["status", "inspect", "recipe show"])
def test_the_plain_c_locale(name: str, folder: Path) -> None:
    """LANG=C without Python's coercion to UTF-8."""
    _, words = COMMANDS[name]
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "mmmamba_cli", *words[:-1], "."],
        cwd=folder / NAME if name != "recipe show" else folder,
        capture_output=True,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))},
            "PYTHONPATH": str(ROOT),
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
        },
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_an_undecodable_name(folder: Path, student_run: Path, tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/run-\xff"
    shutil.copytree(os.fsencode(student_run), place)
    for form in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "mmmamba_cli", "status", "--run", place, *form],
            cwd=ROOT,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        if form:
            assert json.loads(done.stdout)["run"].endswith("run-\udcff")


UNDECODABLE = os.fsdecode(b"run-\xff")
# Each would make or write a folder whose files record what it is given.
WRITERS = {
    "seed --run": ["seed", "scenes-teacher", "--run", UNDECODABLE],
    "seed TEACHER": ["seed", f"{UNDECODABLE}/teacher"],
    "import": ["import", "scenes-linear", "--run", UNDECODABLE],
    "hybridize": ["hybridize", "--run", UNDECODABLE],
    "distill --run": ["distill", "--run", UNDECODABLE],
    "distill --data": ["distill", "--data", UNDECODABLE],
    "export": ["export", "--model", "scenes-linear", "--format", "hub", "--out", UNDECODABLE],
    "eval": ["eval", "--model", "scenes-linear", "--suite", "scenes", "--out", UNDECODABLE],
    "ablate": ["ablate", "plan.yaml", "--work", UNDECODABLE],
    "profile": ["profile", "--random", "hovle-8m", "--out", UNDECODABLE],
    "report": ["report", "--run", UNDECODABLE],
    "scenes": ["scenes", "build", "--out", UNDECODABLE],
}


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
@pytest.mark.parametrize("words", WRITERS.values(), ids=WRITERS.keys())
def test_an_undecodable_name_is_refused_before_anything_is_written(
    words: list[str], mmmamba: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = mmmamba(*words)
    assert ended.code == 2
    assert ended.err.startswith("error: run-\\udcff")
    assert "is not UTF-8" in ended.err and ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_an_undecodable_default_run_or_working_folder(
    mmmamba: Command, hovle_ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may be named by the environment, and a run records the teacher's absolute path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMMAMBA_RUN", UNDECODABLE)
    assert "run-\\udcff is not UTF-8" in mmmamba("seed", hovle_ckpt).err
    monkeypatch.delenv("MMMAMBA_RUN")
    monkeypatch.chdir(hovle_ckpt.parent.rename(tmp_path / UNDECODABLE))
    ended = mmmamba("seed", hovle_ckpt.name, "--no-report")
    assert (ended.code, ended.out) == (2, "")
    assert "run-\\udcff/hovle.ckpt is not UTF-8" in ended.err
    assert not list(Path.cwd().glob("runs/default/*"))


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_a_run_of_an_undecodable_name_is_not_locked(tmp_path: Path) -> None:
    run = Run(tmp_path / UNDECODABLE)
    with pytest.raises(RunError, match="is not UTF-8"), run.lock():
        pass
    assert not run.folder.exists()


def test_text_files_are_opened_with_a_named_encoding() -> None:
    """The default would be the locale's encoding. The check is a preview rule of ruff."""
    pytest.importorskip("ruff")
    rule = ["check", "--isolated", "--preview", "--select", "PLW1514"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *rule, "mmmamba_cli", "evals", "benchmarks", "docs"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
