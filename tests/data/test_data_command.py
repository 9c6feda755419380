"""`mmmamba data check`: what it reports, and its exit codes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conversations import write_conversations
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.runs import Run, RunRecord


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher")) / "hovle.ckpt"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_conversations(tmp_path, 20)


def check(data: Path, teacher: Path, *more: object) -> Result:
    root = ("--image-root", data.parent)
    words = ("data", "check", data, *root, "--model", teacher, *more)
    return CliRunner().invoke(app, [str(word) for word in words])


def report(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def test_a_good_set(data: Path, teacher: Path) -> None:
    result = check(data, teacher, "--json")
    assert result.exit_code == 0, result.output
    found = report(result)
    counts = [found[name] for name in ("samples", "with_images", "images", "bad")]
    assert counts == [20, 10, 10, 0]
    assert 10 <= found["tiles"] <= 30
    assert 0 < found["answer_tokens"] < found["tokens"]
    length = found["length"]
    assert length["min"] < length["median"] < length["p95"] <= length["max"]
    assert "checking: 20/20 samples" in result.stderr


def test_training_comes_next(data: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    root = ("--image-root", str(data.parent))
    train = ["mmmamba", "distill", "--data", str(data), *root, "--run", str(run)]
    lines = check(data, teacher, "--run", run, "--limit", 1).stdout.splitlines()[-2:]
    seed = ["next:", "mmmamba", "seed", str(teacher), "--run", str(run)]
    assert [shlex.split(line) for line in lines] == [seed, train]
    run.mkdir()
    Run(run).write_record(RunRecord(teacher=None, current="seed"))
    last = check(data, teacher, "--run", run, "--limit", 1).stdout.splitlines()[-1]
    assert shlex.split(last) == ["next:", *train]
    bad = check(data, teacher, "--run", run, "--max-length", 2, "--max-bad-share", 0)
    assert bad.exit_code == 2 and "next:" not in bad.stdout


def test_lengths_are_those_before_cutting(data: Path, teacher: Path) -> None:
    whole = report(check(data, teacher, "--json"))
    longest = whole["length"]["max"]
    assert whole["cut"] == 0
    exact = report(check(data, teacher, "--json", "--max-length", longest))
    assert exact == whole
    shorter = report(check(data, teacher, "--json", "--max-length", longest - 1))
    assert shorter["length"] == whole["length"]
    assert shorter["cut"] >= 1
    assert shorter["cut_share"] == shorter["cut"] / 20
    assert shorter["tokens"] == whole["tokens"] - shorter["cut"]


def test_problems_and_the_share_of_them(data: Path, teacher: Path) -> None:
    lines = data.read_text().splitlines()
    lines[2:14] = ["{broken"] * 12
    data.write_text("\n".join(lines))
    result = check(data, teacher)
    assert result.exit_code == 2
    assert "train.jsonl:3" in result.stdout
    assert "train.jsonl:12" in result.stdout
    assert "train.jsonl:13" not in result.stdout
    assert "12 (60.00%)" in result.stdout
    found = report(check(data, teacher, "--json"))
    assert found["bad"] == 12
    assert [count for reason, count in found["reasons"].items() if "not JSON" in reason] == [12]
    assert len(found["named"]) == 10
    assert found["unnamed"] == 2
    assert "and 2 more bad samples; --all names every one" in result.stdout
    every = check(data, teacher, "--all")
    assert all(f"train.jsonl:{line}" in every.stdout for line in range(3, 15))
    assert "more bad samples" not in every.stdout
    found = report(check(data, teacher, "--all", "--json"))
    assert [one["name"] for one in found["named"]] == [f"train.jsonl:{n}" for n in range(3, 15)]
    assert found["unnamed"] == 0
    assert check(data, teacher, "--max-bad-share", 0.6).exit_code == 0
    assert check(data, teacher, "--limit", 2).exit_code == 0


def test_headers_alone_do_not_tell_of_a_cut_picture(data: Path, teacher: Path) -> None:
    picture = sorted((data.parent / "images").iterdir())[0]
    picture.write_bytes(picture.read_bytes()[:60])
    assert report(check(data, teacher, "--json"))["bad"] == 1
    assert report(check(data, teacher, "--json", "--headers-only"))["bad"] == 0


def test_nothing_to_check(tmp_path: Path, teacher: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for source in (empty, tmp_path / "gone.jsonl"):
        result = check(source, teacher)
        assert isinstance(result.exception, MmmambaError)
        assert source.name in str(result.exception)


def test_no_model_to_check_with(data: Path, tmp_path: Path) -> None:
    words = ["data", "check", str(data), "--run", str(tmp_path / "no-run")]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, MmmambaError)
    assert "no-run" in str(result.exception)
