"""`distill --gpus`, torchrun, and signals from terminals and schedulers."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked_launcher
import interrupted_start
import pytest
from preloaded_process import PreloadedProcess, free_port
from slow_steps import run as distill_with_a_slow_step
from test_distill import distill, done, refused, weights

import mmmamba_cli
from mmmamba_cli.__main__ import main
from mmmamba_cli.runs import Run

ROOT = Path(mmmamba_cli.__file__).parents[1]
PAGE = ROOT / "docs/how-to/several-gpus.md"
TWO = ("--device", "cpu", "--gpus", "2")
STAGE = ("--stage", "1")
LONG = ("--set", "stages.stage1.steps=100000")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", *map(str, words)]


def ended(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def start(work: Path, seeded: Path, *more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("mmmamba_cli", *distill(work, seeded, *more)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def start_forked(work: Path, seeded: Path, *more: object) -> PreloadedProcess:
    words = [*map(str, distill(work, seeded, *more, *TWO))]
    return PreloadedProcess(forked_launcher.run, words, work / "output")


def children(pid: int) -> dict[int, str]:
    """The command lines of the processes that a process has started, in that order."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {child: Path(f"/proc/{child}/cmdline").read_text() for child in sorted(map(int, found))}


def spawned(pid: int) -> list[int]:
    return [child for child, line in children(pid).items() if "spawn_main" in line]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    # A zombie has ended, but its exit code has not been read.
    return state != "Z"


def has_state(work: Path) -> Any:
    return lambda: list((work / "run/training/stage1").glob("step-*/state.json"))


def test_two_processes_are_one_command(work: Path, seeded: Path) -> None:
    result = ended(command("mmmamba_cli", *distill(work, seeded, *STAGE, *TWO, "--json")))
    assert result.returncode == 0, result.stderr
    (product,) = json.loads(result.stdout)["products"]
    assert product["name"] == "stage1"
    for line in ("starting from seed", "mixer-mse, 4 steps", "writing stage1", "stage1 4/4"):
        assert result.stderr.count(line) == 1, result.stderr
    assert "Warning" not in result.stderr
    done(*distill(work, seeded, *STAGE, "--restart"))
    assert Run(work / "run").product("stage1").created > product["created"]


def test_one_error_of_two_processes(work: Path, seeded: Path) -> None:
    process = start_forked(work, seeded, "--stage", "3")
    assert process.wait(timeout=120) == 2
    first, *lines = process.text().splitlines()
    assert first == "starting 2 processes"
    assert len(lines) == 1, process.text()
    assert lines[0].startswith("error: stage stage3 starts from a product that has done")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gpus", "0"), "--gpus 0: expected 1 or more"),
        (("--gpus", "99"), "--gpus 99: this machine has"),
    ],
)
def test_invalid_numbers_of_gpus(
    more: tuple[str, ...], message: str, work: Path, seeded: Path
) -> None:
    assert message in refused(*distill(work, seeded, *more))


@pytest.mark.parametrize("to_group", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_both(
    number: int, to_group: bool, work: Path, seeded: Path
) -> None:
    """Sent to the process group as by a terminal (each gets it twice), and to one process."""
    parallel = () if to_group else ("--parallel", "shard")
    process = start_forked(work, seeded, *STAGE, *LONG, *parallel)
    process.wait_for(has_state(work))
    (os.killpg if to_group else os.kill)(process.pid, number)
    code, output = process.wait(timeout=120), process.text()
    assert code == 130, output
    assert output.count("stopped and saved") == 1, output
    how = "replicated" if to_group else "sharded, gathered once per step"
    assert output.count(f"parameters {how}: gradients and moments of replicas take 0.00 GiB") == 1
    assert output.count("stopping after this step") == 1, output
    assert "Traceback" not in output
    (state,) = (work / "run/training/stage1").glob("step-*")
    rows = (work / "run/training/stage1/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == int(state.name[5:])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_imports_ends_all(number: int, code: int, work: Path, seeded: Path) -> None:
    process = start(work, seeded, *STAGE, *LONG, *TWO)
    deadline = time.monotonic() + 120
    while len(spawned(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    assert_ended(process.returncode, code, output)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_ends_all(
    number: int, code: int, work: Path, seeded: Path
) -> None:
    process = start_forked(work, seeded, *STAGE, *LONG)
    process.wait_for(lambda: "starting from seed" in process.text())
    os.killpg(process.pid, number)
    assert_ended(process.wait(timeout=120), code, process.text())


def assert_ended(found: int, code: int, output: str) -> None:
    # The signal may arrive during training, when there is a state to save.
    assert found == (130 if "stopped and saved" in output else code), output
    assert "Traceback" not in output
    assert "error: " not in output


@pytest.mark.parametrize("when", ["during", "after"])
def test_an_interrupt_while_processes_start_prints_no_traceback(
    when: str, work: Path, seeded: Path
) -> None:
    """Processes that still unpickle their arguments are killed before their semaphores go."""
    words = [when, *map(str, distill(work, seeded, *STAGE, *TWO))]
    process = PreloadedProcess(interrupted_start.run, words, work / "output")
    assert process.wait(timeout=120) == 130, process.text()
    assert "Traceback" not in process.text()


def test_a_process_that_is_killed_ends_all(work: Path, seeded: Path) -> None:
    process = start_forked(work, seeded, *STAGE, *LONG)
    process.wait_for(has_state(work))
    os.kill(list(children(process.pid))[-1], signal.SIGKILL)
    code, output = process.wait(timeout=120), process.text()
    assert code == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "a process of this run was killed" in errors[0]
    assert "Traceback" not in output


def test_processes_end_with_their_launcher(work: Path, seeded: Path) -> None:
    process = start_forked(work, seeded, *STAGE, *LONG)
    process.wait_for(has_state(work))
    running = list(children(process.pid))
    assert len(running) == 2
    process.kill()
    deadline = time.monotonic() + 120
    while any(map(is_running, running)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(number: int, code: int, work: Path, seeded: Path) -> None:
    """In a step that does not end: saved states remain, and nothing incomplete."""
    words = [*map(str, distill(work, seeded, *STAGE))]
    process = PreloadedProcess(distill_with_a_slow_step, words, work / "output")
    process.wait_for(lambda: "in step 3" in process.text())
    os.kill(process.pid, number)
    # A copy of the same request, as launchers forward it.
    os.kill(process.pid, number)
    # The second that separates two requests begins when the process handles the first.
    process.wait_for(lambda: "stopping after this step" in process.text())
    time.sleep(1.3)
    assert process.poll() is None
    os.kill(process.pid, number)
    assert process.wait(timeout=120) == code, process.text()
    assert "Traceback" not in process.text()
    assert [p.name for p in (work / "run/training/stage1").glob("*step-*")] == ["step-00000002"]


def documented() -> list[list[str]]:
    """The torchrun commands of the how-to page, split into words."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^(?:srun )?torchrun --.*$", text, re.MULTILINE)
    filled = {'"$SLURM_NNODES"': "2", '"$SLURM_JOB_ID"': "7", '"$head:29500"': "head:29500"}
    for name, value in filled.items():
        found = [line.replace(name, value) for line in found]
    return [shlex.split(line.removeprefix("srun ")) for line in found]


@pytest.mark.parametrize("words", documented(), ids=lambda words: " ".join(words[1:3]))
def test_torchrun_takes_the_documented_commands(words: list[str]) -> None:
    from torch.distributed.run import parse_args

    parsed = parse_args(words[1:])
    assert (parsed.module, parsed.training_script) == (True, "mmmamba_cli")
    rest = [word for word in parsed.training_script_args if word != "--"]
    assert rest[:2] == ["distill", "--run"]
    # Without "--", argparse of Python 3.11 finds --run ambiguous.
    assert words[words.index("distill") - 1] == "--"


def test_the_documented_torchrun(work: Path, seeded: Path) -> None:
    (words,) = [words for words in documented() if "--standalone" in words]
    assert words[:4] == ["torchrun", "--standalone", "--nproc-per-node", "8"]
    own = [*words[1:3], "2", *words[4 : words.index("distill")]]
    more = ("--device", "cpu", *STAGE)
    words = command("torch.distributed.run", *own, *distill(work, seeded, *more))
    result = ended(words)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stage1: linear") == 1
    for line in ("starting from seed", "writing stage1", "stage1 4/4"):
        assert result.stderr.count(line) == 1, result.stderr
    assert weights(work, "stage1")


def test_one_error_under_torchrun(work: Path, seeded: Path) -> None:
    """Two processes with the environment of torchrun."""
    words = [*map(str, distill(work, seeded, "--device", "cpu", "--stage", "3"))]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        PreloadedProcess(
            main,
            words,
            work / f"output-{rank}",
            {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **address},
        )
        for rank in "01"
    ]
    codes = [process.wait(timeout=120) for process in processes]
    assert codes == [2, 2], [process.text() for process in processes]
    first, second = (process.text() for process in processes)
    assert first.startswith("error: stage stage3 starts from") and first.count("\n") == 1
    assert second == ""


def test_gpus_under_torchrun_are_refused(
    work: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(*distill(work, seeded, *STAGE, *TWO))
    assert message.startswith("--gpus starts processes, and torchrun has")
