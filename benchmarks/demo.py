"""Demo of all commands on a laptop, in minutes: seed, distill, hybridize, eval, profile, report.

`make demo` runs it on the shipped teacher of composed scenes; it ends with one HTML page. It
resumes where it was stopped. Every step is a command of mmmamba, printed before it runs; what a
student shares with its teacher on held-out lessons is measured by `demo_measurements.py`. The
seeded students and the unseeded one are trained in parallel, each with half of the threads, because
steps this small gain little from more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from demo_estimate import TimeEstimate, fitting_sizes, measure_slowdown, total_seconds
from demo_lanes import LaneFailure, Watch, is_done, run_lanes, work_through
from demo_steps import LANE_GROUPS, LANES, RECIPE, Sizes, Step, steps

from mmmamba_cli.cli.console import approximate_time, progress
from mmmamba_cli.errors import MmmambaError, RunError
from mmmamba_cli.interrupts import handle_interrupts

MARKER = "demo.json"
MISTAKE, INTERRUPTED, TERMINATED = 2, 130, 143


def prepare_folder(
    folder: Path, overwrite: bool, minutes: float | None = None, slowdown: float = 1.0
) -> Sizes:
    """Create the folder, or resume in one of this demo; return the sizes of its work.

    A demo that is resumed keeps its sizes, whatever the machine is like now.

    Raises `RunError` for a folder of something else, of another version, or of other --minutes.
    """
    file = folder / MARKER
    if folder.exists() and any(folder.iterdir()):
        if not file.is_file():
            raise RunError(
                f"{folder} exists and is not the folder of a demo",
                "choose another folder with --out",
            )
        if not overwrite:
            print(f"{folder} is there: going on with it; --overwrite starts over\n")
            return sizes_of(folder, minutes)
        shutil.rmtree(folder)
    sizes = Sizes() if minutes is None else fitting_sizes(minutes, slowdown)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(marker_of(sizes, minutes)), encoding="utf-8")
    return sizes


def marker_of(sizes: Sizes, minutes: float | None) -> dict[str, Any]:
    marker = {
        "format": 2, "recipe": RECIPE, "lessons": sizes.lessons, "pictures": sizes.pictures
    }  # fmt: skip
    if sizes != Sizes():
        values = {**asdict(sizes), "stage_steps": list(sizes.stage_steps)}
        marker |= {"minutes": minutes, "sizes": values}
    return marker


def sizes_of(folder: Path, minutes: float | None = None) -> Sizes:
    """The sizes with which a demo's folder was begun."""
    start_over = "start over with --overwrite, or choose another folder with --out"
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    stored = marker.get("sizes", {})
    if set(stored) - set(asdict(Sizes())):
        raise RunError(f"{folder} was begun by another version of the demo", start_over)
    sizes = Sizes(**stored | {"stage_steps": tuple(stored.get("stage_steps", Sizes.stage_steps))})
    if marker != marker_of(sizes, marker.get("minutes")):
        raise RunError(f"{folder} was begun by another version of the demo", start_over)
    if minutes is not None and minutes != marker.get("minutes"):
        begun = f"with --minutes {marker['minutes']:g}" if "minutes" in marker else "with all work"
        raise RunError(
            f"{folder} was begun {begun}, not with --minutes {minutes:g}",
            f"leave out --minutes to go on with it, {start_over}",
        )
    return sizes


def print_plan(listed: Mapping[int, Step], sizes: Sizes, slowdown: float) -> TimeEstimate:
    """Print the expected time and what --minutes changed; return the estimate."""
    todo = {number: step for number, step in listed.items() if not is_done(step)}
    estimate = TimeEstimate(todo, slowdown)
    left = approximate_time(estimate.seconds_left())
    rest = "" if len(todo) == len(listed) else f"; {len(listed) - len(todo)} were done before"
    print(f"{len(listed)} parts, {left} on this machine as it is now{rest}")
    full = Sizes()
    if sizes != full:
        everything = approximate_time(total_seconds(list(steps(full, slowdown)), slowdown))
        print(
            f"the full demo would take {everything}; this one does less, so students learn less: "
            f"{', '.join(map(str, sizes.stage_steps))} training steps instead of "
            f"{', '.join(map(str, full.stage_steps))}, {sizes.lessons} lessons of {full.lessons}, "
            f"{sizes.questions} questions of {full.questions}, contexts {sizes.contexts}"
        )
    print(flush=True)
    return estimate


def demo(folder: Path, sizes: Sizes, slowdown: float) -> None:
    """Run all steps that are not done, in the working directory `folder`."""
    listed = dict(enumerate(steps(sizes, slowdown), start=1))
    estimate = print_plan(listed, sizes, slowdown)
    with progress(
        "demo", len(listed), "parts", time_left=estimate.seconds_left
    ) as advance:  # fmt: skip
        watch = Watch(len(listed), estimate, advance)
        for number, step in listed.items():
            if number not in estimate.todo:
                print(f"[{number}/{len(listed)}] {step.what}: done before", flush=True)
                advance(1)
        for group in LANE_GROUPS:
            todo = {step.lane for step in estimate.todo.values()}
            if names := [lane for lane in group if lane in todo]:
                run_lanes(names, watch, folder, slowdown)


def run_lane(name: str, folder: Path, slowdown: float) -> None:
    """The steps of one lane, in a process that the demo has started."""
    os.chdir(folder)
    listed = enumerate(steps(sizes_of(folder), slowdown), start=1)
    work_through({number: step for number, step in listed if step.lane == name})


def end_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM as an exception, so that the lanes are ended too."""
    raise SystemExit(128 + number)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over")
    parser.add_argument(
        "--minutes",
        type=positive_number,
        metavar="M",
        help="do less work, so that it takes about M minutes (default: all work)",
    )
    # Internal: the demo starts itself for one lane.
    parser.add_argument("--lane", choices=LANES, help=argparse.SUPPRESS)
    parser.add_argument("--slowdown", type=positive_number, default=1.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of minutes, expected a number above 0"
        )
    return value


def main() -> int:
    handle_interrupts()
    options = parse_options()
    folder = options.out.absolute()
    if options.lane is not None:
        run_lane(options.lane, folder, options.slowdown)
        return 0
    signal.signal(signal.SIGTERM, end_by_signal)
    began = time.perf_counter()
    try:
        print("demo of mmmamba: measuring how fast this machine is", flush=True)
        slowdown = measure_slowdown()
        sizes = prepare_folder(folder, options.overwrite, options.minutes, slowdown)
        os.chdir(folder)
        demo(folder, sizes, slowdown)
        # Imported here, so that the first line comes at once.
        from demo_summary import summary

        lines = summary(folder)
    except MmmambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except LaneFailure as error:
        print(f"error: {error}; finished parts are kept", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPTED
    print(f"\nthe demo took {time.perf_counter() - began:.0f} s", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
