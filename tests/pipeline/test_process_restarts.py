"""`distill --gpus 2 --max-restarts`: processes that are killed start again from the last state."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from preloaded_process import PreloadedProcess
from test_distill import refused, same, weights
from test_several_processes import LONG, STAGE, TWO, distill, has_state, start_forked

STEPS_PER_KILL = 4
# Number of kills; use MMMAMBA_KILLS=10 for the full test.
KILLS = int(os.environ.get("MMMAMBA_KILLS", "2"))


def steps_done(work: Path) -> int:
    """The step of the newest state."""
    folder = work / "run/training/stage1"
    return max((int(p.parent.name[5:]) for p in folder.glob("step-*/state.json")), default=0)


def metrics(work: Path) -> list[Any]:
    rows = (work / "run/products/stage1/metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, rows)]


def training(work: Path, seeded: Path, kills: int) -> PreloadedProcess:
    settings = {"steps": STEPS_PER_KILL * (kills + 1), "save_every": 1, "evaluate_every": 1000}
    words = [w for k, v in settings.items() for w in ("--set", f"stages.stage1.{k}={v}")]
    return start_forked(work, seeded, *STAGE, *words, "--max-restarts", kills)


def children(process: PreloadedProcess) -> list[int]:
    """The processes that the launcher has started."""
    pid = process.pid
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def kill_one(process: PreloadedProcess, rank: int, wait: bool) -> None:
    """Kill one of two processes; `wait` until the launcher has ended the other one."""
    ranks = children(process)
    assert len(ranks) == 2
    os.kill(ranks[rank], signal.SIGKILL)
    if wait:
        process.wait_for(lambda: not set(ranks) & set(children(process)))


@pytest.mark.parametrize("kills", [KILLS])
def test_a_run_whose_processes_are_killed_ends_as_an_undisturbed_one(
    kills: int, work: Path, seeded: Path, tmp_path: Path
) -> None:
    calm = tmp_path / "calm"
    shutil.copytree(work / "run", calm / "run")
    undisturbed = training(calm, seeded, kills)
    rng, process = random.Random(kills), training(work, seeded, kills)
    for kill in range(kills):
        # A state after the last kill, so that new processes wrote it.
        process.wait_for(lambda: steps_done(work) > kill * STEPS_PER_KILL)  # noqa: B023
        kill_one(process, rng.randrange(2), wait=True)
    assert process.wait(timeout=240) == 0, process.text()
    assert undisturbed.wait(timeout=240) == 0, undisturbed.text()
    output = process.text()
    for number in range(1, kills + 1):
        assert output.count(f"starting again from the last state, {number} of {kills}") == 1
    assert "Traceback" not in output
    assert same(weights(work, "stage1"), weights(calm, "stage1"))
    assert metrics(work) == metrics(calm)
    assert "starting again" not in undisturbed.text()


def test_the_number_of_restarts_is_limited(work: Path, seeded: Path) -> None:
    process = start_forked(work, seeded, *STAGE, *LONG, "--max-restarts", 1)
    process.wait_for(has_state(work))
    kill_one(process, 0, wait=True)
    # Before they have found each other, the other process would wait for half a minute.
    process.wait_for(lambda: "resuming after step" in process.text())
    kill_one(process, 1, wait=False)
    assert process.wait(timeout=120) == 2, process.text()
    errors = [line for line in process.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a process of this run was killed" in errors[0], process.text()
    assert process.text().count("starting again") == 1


def test_a_process_that_waits_for_a_killed_one_is_killed_soon(work: Path, seeded: Path) -> None:
    process = start_forked(work, seeded, *STAGE, *LONG)
    process.wait_for(has_state(work))
    first, second = children(process)
    # As in a collective on GPUs, which no signal but SIGKILL ends. torch waits for 30 seconds.
    os.kill(second, signal.SIGSTOP)
    began = time.monotonic()
    os.kill(first, signal.SIGKILL)
    assert process.wait(timeout=120) == 2, process.text()
    assert time.monotonic() - began < 25
    assert "error: a process of this run was killed" in process.text()


def test_options_that_exclude_restarts(work: Path, seeded: Path) -> None:
    words = distill(work, seeded, *STAGE, "--max-restarts", 2)
    assert "--max-restarts 2: a single process cannot start itself again" in refused(*words)
    message = refused(*words, *TWO, "--restart")
    assert message.startswith("--max-restarts goes on from the last state")
