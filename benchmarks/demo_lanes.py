"""Lanes of the demo: processes that run steps, and the process that watches them.

Each lane is a process that imports torch once for all of its commands. The watching process
imports nothing large, so that it can always say what is going on and how long it will take.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demo_estimate import TimeEstimate
from demo_steps import COMPARE, Step

from mmmamba_cli.cli.console import approximate_time

# Events of a lane are JSON text sequences (RFC 7464) between the lines of its commands: no command
# prints this character.
RECORD = "\x1e"
BEGIN, END = "begin", "end"
# Above this slowdown other programs use the cores. Threads of OpenMP that spin while they wait for
# each other then keep the others from running: the comparison took 30 times as long.
BUSY_SLOWDOWN = 1.5
# Seconds until a lane that does not stop is killed.
STOP_SECONDS = 60
# Few CPU threads gain anything on steps this small.
MAX_LANE_THREADS = 4


class LaneFailure(Exception):
    """A lane ended with an exit code that is not 0; the others have been stopped."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def is_done(step: Step) -> bool:
    return step.done is not None and Path(step.done).is_file()


def emit(event: str, number: int) -> None:
    print(f"{RECORD}{json.dumps({'event': event, 'step': number})}", flush=True)


def work_through(listed: Mapping[int, Step]) -> None:
    """Run the steps that are not done, in order, in the working directory of this process."""
    for number, step in listed.items():
        if is_done(step):
            continue
        emit(BEGIN, number)
        if step.words == (COMPARE,):
            compare()
        else:
            perform(step.words)
        emit(END, number)


def compare() -> None:
    """Measure the students against the teacher, unless this was done."""
    from mmmamba_cli.cli.console import progress

    with progress("comparing students with the teacher"):
        from demo_measurements import is_measured, measure

        if not is_measured(Path()):
            measure(Path())


def perform(words: Sequence[str]) -> None:
    """Run a command of mmmamba in this process, which saves importing torch each time.

    Raises SystemExit with its exit code if it did not end well.
    """
    from mmmamba_cli.cli import main as run_command

    before = sys.argv
    sys.argv = ["mmmamba", *words]
    try:
        run_command()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = before


@dataclass
class Watch:
    """Prints the lines of lanes and keeps the time; `advance` counts finished steps."""

    total: int
    estimate: TimeEstimate
    advance: Callable[[int], None]
    _running: dict[str, int] = field(default_factory=dict)
    # Lanes write from threads.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def follow(self, lane: str, prefix: str, lines: Iterable[str]) -> None:
        for line in lines:
            with self._lock:
                if line.startswith(RECORD):
                    event = json.loads(line.removeprefix(RECORD))
                    line = self._note(lane, event["event"], event["step"])
                if line.strip():
                    text = "".join(f"{prefix}{part}\n" for part in line.splitlines())
                    sys.stdout.write(text)
                    sys.stdout.flush()

    def _note(self, lane: str, event: str, number: int) -> str:
        step = self.estimate.todo[number]
        if event == BEGIN:
            self._running[lane] = number
            self.estimate.begin(number)
            command = "" if step.words == (COMPARE,) else f"\n$ mmmamba {' '.join(step.words)}"
            return f"[{number}/{self.total}] {step.what}{command}"
        del self._running[lane]
        seconds = self.estimate.end(number)
        self.advance(1)
        left = approximate_time(self.estimate.seconds_left())
        return f"[{number}/{self.total}] done in {seconds:.0f} s; {left} left for all"

    def step_of(self, lane: str) -> str:
        """The step that a lane is at, for a message."""
        number = self._running.get(lane)
        if number is None:
            return f"the {lane} lane"
        return f"[{number}/{self.total}] {self.estimate.todo[number].what}"


def run_lanes(names: Sequence[str], watch: Watch, folder: Path, slowdown: float = 1.0) -> None:
    """Run the lanes in parallel, each in its own process, until all have ended.

    The lines of several are prefixed with the lane, and they share the CPU's threads.

    Raises:
        LaneFailure: a lane failed; the others have been stopped.
        KeyboardInterrupt: Ctrl-C; the lanes have saved and ended.
    """
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if len(names) > 1:
        environment["OMP_NUM_THREADS"] = str(lane_threads(len(names)))
    if slowdown > BUSY_SLOWDOWN:
        environment["OMP_WAIT_POLICY"] = "passive"
    readers: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:
        # After the lanes have ended: their last lines.
        stack.callback(lambda: [reader.join() for reader in readers])
        lanes = {
            name: stack.enter_context(lane_process(command_of(name, folder, slowdown), environment))
            for name in names
        }
        for name, lane in lanes.items():
            prefix = f"{name:>8} | " if len(names) > 1 else ""
            assert lane.stdout is not None
            readers.append(
                threading.Thread(target=watch.follow, args=(name, prefix, lane.stdout), daemon=True)
            )
            readers[-1].start()
        failed = wait_for(lanes)
    if failed is not None:
        code = lanes[failed].returncode
        raise LaneFailure(f"{watch.step_of(failed)}: ended with exit code {code}", code)


def lane_threads(lanes: int) -> int:
    """Threads of each of several lanes: an even share of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = min(cores, int(given)) if given.isdigit() else cores
    return max(1, min(MAX_LANE_THREADS, cores // lanes))


def command_of(lane: str, folder: Path, slowdown: float) -> list[str]:
    script = Path(__file__).resolve().parent / "demo.py"
    words = ("--lane", lane, "--out", str(folder), "--slowdown", str(slowdown))
    return [sys.executable, str(script), *words]


@contextlib.contextmanager
def lane_process(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A process of a lane; at the end it has ended, by an interrupt if need be.

    It has a session of its own: Ctrl-C reaches this process only, which passes it on once. A second
    one kills the lane; what its command has completed stays.
    """
    lane = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        yield lane
    finally:
        try:
            if lane.poll() is None:
                # A shell starts background jobs with SIGINT ignored, and lanes inherit that.
                is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
                lane.send_signal(signal.SIGTERM if is_ignored else signal.SIGINT)
            lane.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            lane.kill()
            lane.wait()
        finally:
            lane.kill()


def wait_for(lanes: Mapping[str, subprocess.Popen[str]]) -> str | None:
    """Wait until all lanes have ended well, or one has failed; return the failed one."""
    while True:
        codes = {name: lane.poll() for name, lane in lanes.items()}
        failed = next((name for name, code in codes.items() if code), None)
        if failed is not None or None not in codes.values():
            return failed
        time.sleep(0.1)
