"""The demo never is silent: its lanes, their events, its estimate of the time, its last lines."""

from __future__ import annotations

import importlib
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from report_case import product, write_run, write_small_profile

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def lanes() -> ModuleType:
    sys.path.append(str(BENCHMARKS))
    return importlib.import_module("demo_lanes")


@pytest.fixture(scope="module")
def estimates(lanes: ModuleType) -> ModuleType:
    return importlib.import_module("demo_estimate")


@pytest.fixture(scope="module")
def steps(lanes: ModuleType) -> ModuleType:
    return importlib.import_module("demo_steps")


@pytest.fixture(scope="module")
def summaries(lanes: ModuleType) -> ModuleType:
    return importlib.import_module("demo_summary")


@pytest.fixture(autouse=True)
def default_interrupts() -> Iterator[None]:
    """Tests send SIGINT, which a test run in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch(lanes: ModuleType, estimates: ModuleType, steps: ModuleType) -> Any:
    """A watch over three steps: one alone, then two lanes side by side."""
    todo = {
        1: steps.Step("draw", ("scenes", "build"), "drawing", work=steps.Work(10)),
        2: steps.Step("one lane", ("seed",), "seeded", work=steps.Work(20)),
        3: steps.Step("the other", ("seed",), "unseeded", work=steps.Work(30)),
    }
    return lanes.Watch(3, estimates.TimeEstimate(todo, 2.0, Clock()), lambda more: None)


def test_lanes_of_a_group_overlap(watch: Any) -> None:
    # 10 alone, then the longer one of 20 and 30, on a machine half as fast.
    assert watch.estimate.seconds_left() == 2 * (10 + 30)


def test_time_left_goes_down_and_learns_from_finished_steps(watch: Any) -> None:
    estimate = watch.estimate
    estimate.begin(1)
    estimate.clock.now += 15
    assert estimate.seconds_left() == 2 * (10 + 30) - 15
    # A step beyond its time: the rest is expected to be slow too, and never less than before.
    estimate.clock.now += 25
    assert estimate.end(1) == 40
    slow = (10 * 2.0 + 40) / (10 + 10)
    assert estimate.seconds_left() == slow * 30
    estimate.begin(2)
    estimate.begin(3)
    estimate.clock.now += 30
    assert estimate.seconds_left() == slow * 30 - 30
    for number in (2, 3):
        estimate.end(number)
    assert estimate.seconds_left() == 0


def test_step_beyond_its_time_slows_the_others(watch: Any) -> None:
    estimate = watch.estimate
    estimate.begin(1)
    estimate.clock.now += 60
    # 2 s per second of work were expected, 6 have passed.
    assert estimate.seconds_left() == 0.1 * 60 + (10 * 2.0 + 60) / (10 + 10) * 30


def test_profile_time_is_fixed(estimates: ModuleType, steps: ModuleType) -> None:
    assert estimates.seconds_of(steps.Work(3.0, fixed=12.0), 10.0) == 42.0


def test_profile_may_take_longer_on_a_busy_machine(steps: ModuleType) -> None:
    for slowdown, seconds in ((0.5, 12), (3.0, 36), (100.0, 96)):
        listed = list(steps.steps(steps.Sizes(), slowdown))
        (step,) = [step for step in listed if step.words[0] == "profile"]
        assert step.words[-2:] == ("--budget", str(seconds))
        assert step.work.fixed == seconds
        # Nothing else depends on it.
        assert [one for one in listed if one != step] == [
            one for one in steps.steps(steps.Sizes()) if one.words[0] != "profile"
        ]


def test_slowdown_is_measured(estimates: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "SPEED_TEST_LOOPS", 4_000)
    fast = estimates.measure_slowdown()
    monkeypatch.setattr(estimates, "SPEED_TEST_LOOPS", 800_000)
    assert estimates.measure_slowdown() > fast > 0


def test_minutes_choose_the_largest_work_that_fits(
    estimates: ModuleType, steps: ModuleType
) -> None:
    full = estimates.total_seconds(list(steps.steps(steps.Sizes())), 1.0)
    assert estimates.fitting_sizes(full / 60, 1.0) == steps.Sizes()
    chosen = estimates.fitting_sizes(0.7 * full / 60, 1.0)
    assert chosen.stage_steps < steps.Sizes().stage_steps
    assert estimates.total_seconds(list(steps.steps(chosen)), 1.0) <= 0.7 * full
    smallest = steps.Sizes.reduced(estimates.SHARES[-1])
    assert estimates.fitting_sizes(1 / 60, 100.0) == smallest
    assert smallest.pictures == steps.Sizes().pictures


def test_lines_and_events_of_a_lane(
    lanes: ModuleType, watch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[int] = []
    watch.advance = counted.append
    begin, end = (
        f"{lanes.RECORD}{json.dumps({'event': event, 'step': 2})}\n" for event in ("begin", "end")
    )
    watch.follow("seeded", "  seeded | ", io.StringIO(f"{begin}one\n\n  \ntwo\n"))
    assert watch.step_of("seeded") == "[2/3] one lane"
    watch.estimate.clock.now += 40
    watch.follow("seeded", "  seeded | ", io.StringIO(end))
    assert counted == [1]
    assert capsys.readouterr().out.splitlines() == [
        "  seeded | [2/3] one lane",
        "  seeded | $ mmmamba seed",
        "  seeded | one",
        "  seeded | two",
        "  seeded | [2/3] done in 40 s; about 80 s left for all",
    ]


@pytest.fixture
def script(
    tmp_path: Path, lanes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Replaces the demo's script, which a lane runs with `--lane NAME --out FOLDER`."""
    monkeypatch.setattr(lanes, "__file__", str(tmp_path / "demo_lanes.py"))

    def write(code: str) -> None:
        head = "import os, sys, time\nlane = sys.argv[sys.argv.index('--lane') + 1]\n"
        (tmp_path / "demo.py").write_text(head + code)

    return write


def test_lanes_share_threads_and_prefix_lines(
    lanes: ModuleType,
    watch: Any,
    script: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script("print(lane, 'has', os.environ.get('OMP_NUM_THREADS'))\nprint('!', file=sys.stderr)\n")
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lanes.run_lanes(("seeded", "unseeded"), watch, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == [
        "  seeded | !",
        "  seeded | seeded has 3",
        "unseeded | !",
        "unseeded | unseeded has 3",
    ]
    lanes.run_lanes(("drawing",), watch, tmp_path)
    assert capsys.readouterr().out.splitlines() == ["drawing has None", "!"]
    # Threads that spin on a busy machine keep each other from running.
    script("print(os.environ.get('OMP_WAIT_POLICY'))\n")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for slowdown, policy in ((1.0, "None"), (3.0, "passive")):
        lanes.run_lanes(("drawing",), watch, tmp_path, slowdown)
        assert capsys.readouterr().out.splitlines() == [policy]


@pytest.mark.parametrize("ignores", ["nothing", "SIGINT", "all"])
def test_failed_lane_is_named_once_and_stops_the_other(
    ignores: str,
    lanes: ModuleType,
    watch: Any,
    script: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where SIGINT is ignored, as in a background job, and where a lane does not stop."""
    if ignores != "nothing":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ignores == "all":
        monkeypatch.setattr(lanes, "STOP_SECONDS", 0.2)
    script(
        "if lane == 'seeded':\n"
        f"    if {ignores == 'all'}:\n"
        "        import signal\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    time.sleep(600)\n"
        """print('\\x1e{"event": "begin", "step": 3}')\n"""
        "print('error: no luck', flush=True)\nsys.exit(5)\n"
    )
    with pytest.raises(lanes.LaneFailure, match=r"\[3/3\] the other: ended with exit code 5") as e:
        lanes.run_lanes(("seeded", "unseeded"), watch, tmp_path)
    assert e.value.code == 5


def test_ctrl_c_reaches_a_lane_once(
    lanes: ModuleType,
    watch: Any,
    script: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    script(
        "try:\n"
        "    open('ready', 'w').close()\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.3)\n"
        "    open('saved', 'w').close()\n"
    )
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        end = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        lanes.run_lanes(("drawing",), watch, tmp_path)
    assert (tmp_path / "saved").exists()


def test_last_lines_quote_measured_files_and_not_the_demos_profile(
    summaries: ModuleType, tmp_path: Path
) -> None:
    """A profile beside other programs is noisy, and its speeds mean nothing."""
    for lane in ("seeded", "unseeded"):
        write_run(tmp_path / lane, [product("seed", 1)])
    kept, faster, page = summaries.summary(tmp_path)
    measured = json.loads((BENCHMARKS / "results" / summaries.LEAD[0]).read_text())
    above = [f" {100 * one['above_chance']:.0f} %" for one in measured["retention"]]
    assert above and all(share in kept for share in above)
    assert faster.startswith("On a CPU, students decode faster than the teacher in long contexts:")
    assert page == f"open in a browser: {tmp_path / 'report.html'}"
    write_small_profile(tmp_path / "seeded")
    assert summaries.summary(tmp_path) == [kept, faster, page]
    # Without measured files the profile would be quoted: it was read.
    assert summaries.summary(tmp_path, lead=())[:-1] != [kept, faster]
