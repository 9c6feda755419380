"""`eval --gpus` and torchrun: two processes of a small real model on the CPU."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from pathlib import Path

import forked_launcher
import pytest
import slow_answers
from ended import Command
from PIL import Image
from preloaded_process import PreloadedProcess, free_port
from scripted_mme import files
from suite_tables import mme_rows, write_tsv

from mmmamba_cli.__main__ import main

TWO = ("--device", "cpu", "--gpus", 2)


def words(run: Path, data: Path, out: Path, *more: object) -> list[str]:
    """One pair of questions in each category of MME, 14 batches."""
    given = ["eval", "--suite", "mme", "--run", run, "--data", data, "--out", out, "--batch", 2]
    return [*map(str, [*given, "--limit", 28, "--max-new-tokens", 3, *more])]


def alone(mmmamba: Command, run: Path, data: Path, out: Path, *more: object) -> None:
    done = mmmamba(*words(run, data, out, "--device", "cpu", *more))
    assert done.code == 0, done.err


def answers(out: Path) -> int:
    return sum(f.read_text().count('"prediction"') for f in out.rglob("predictions-*.jsonl"))


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def test_two_processes_are_one_command(
    mmmamba: Command, small_run: Path, data: Path, tmp_path: Path
) -> None:
    """Student and teacher, with a warning about a picture of either process."""
    rows = mme_rows()
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    for place in (4, 40):
        rows[place]["image"] = base64.b64encode(file.getvalue()).decode()
    write_tsv(data / "MME.tsv", rows)
    given = words(small_run, data, tmp_path / "two", "--teacher", "--json", *TWO)
    process = PreloadedProcess(forked_launcher.run, given, tmp_path / "output")
    assert process.wait(timeout=120) == 0, process.text()
    text = process.text()
    for line in (
        "seed was never distilled",
        "loading seed",
        "seed: MME: 28/28",
        "teacher: MME: 28/",
    ):
        assert text.count(line) == 1, text
    for row in (4, 5, 40, 41):
        assert f"warning: the image of row {row} (" in text
    assert "Traceback" not in text
    alone(mmmamba, small_run, data, tmp_path / "one", "--teacher")
    for name in ("seed", "teacher"):
        assert files(tmp_path / "two" / name / "mme") == files(tmp_path / "one" / name / "mme")
    found = json.loads(text[text.index("{\n") :])
    assert [one["model"]["name"] for one in found["results"]] == ["seed", "teacher"]
    assert found["retention"]
    timing = json.loads((tmp_path / "two/seed/mme/timing.json").read_text())
    assert (timing["processes"], timing["answered"]) == (2, 28)


def test_killed_process_ends_both_and_one_resumes(
    mmmamba: Command, small_run: Path, data: Path, tmp_path: Path
) -> None:
    given = words(small_run, data, tmp_path / "two", *TWO)
    process = PreloadedProcess(slow_answers.run, given, tmp_path / "output")
    process.wait_for(lambda: answers(tmp_path / "two"))
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=120) == 2, process.text()
    assert process.text().count("error: a process of this run was killed") == 1
    assert "Traceback" not in process.text()
    assert 0 < answers(tmp_path / "two") < 28
    assert not list(tmp_path.rglob("result.json"))
    alone(mmmamba, small_run, data, tmp_path / "two")
    alone(mmmamba, small_run, data, tmp_path / "one")
    assert files(tmp_path / "two/seed/mme") == files(tmp_path / "one/seed/mme")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_both_after_the_batch(
    number: int, mmmamba: Command, small_run: Path, data: Path, tmp_path: Path
) -> None:
    given = words(small_run, data, tmp_path / "out", *TWO)
    process = PreloadedProcess(slow_answers.run, given, tmp_path / "output")
    process.wait_for(lambda: answers(tmp_path / "out"))
    os.kill(process.pid, number)
    assert process.wait(timeout=120) == 130, process.text()
    assert process.text().count("stopping after this batch; press Ctrl-C again") == 1
    kept = answers(tmp_path / "out")
    assert 0 < kept < 28
    assert process.text().count(f"interrupted: {kept} of 28 answers to mme are kept in ") == 1
    assert "Traceback" not in process.text()
    assert not list(tmp_path.rglob("result.json"))


def test_processes_of_torchrun(
    mmmamba: Command, small_run: Path, data: Path, tmp_path: Path
) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def both(*more: object) -> list[PreloadedProcess]:
        given = words(small_run, data, tmp_path / "two", "--device", "cpu", *more)
        return [
            PreloadedProcess(
                main,
                given,
                tmp_path / f"output-{rank}",
                {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **address},
            )
            for rank in "01"
        ]

    refused = both("--from", "stage9")
    assert [process.wait(timeout=120) for process in refused] == [2, 2]
    assert refused[0].text().count("has no product 'stage9'") == 1
    assert refused[1].text() == ""
    done = both()
    codes = [process.wait(timeout=120) for process in done]
    assert codes == [0, 0], [process.text() for process in done]
    assert done[0].text().count("seed: MME: 28/28") == 1
    assert done[1].text() == ""
    alone(mmmamba, small_run, data, tmp_path / "one")
    assert files(tmp_path / "two/seed/mme") == files(tmp_path / "one/seed/mme")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--gpus", 0), "--gpus 0: expected 1 or more"),
        (("--gpus", 99), "--gpus 99: this machine has"),
        (("--gpus", 2, "--with", "lm-eval"), "--with lm-eval runs in one process"),
        (("--gpus", 2, "--predictions", "a.tsv"), "--predictions runs in one process"),
    ],
)
def test_wrong_uses_of_gpus_give_one_sentence(
    mmmamba: Command,
    data: Path,
    small_run: Path,
    tmp_path: Path,
    more: tuple[object, ...],
    said: str,
) -> None:
    done = mmmamba(*words(small_run, data, tmp_path / "out", *more))
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1
