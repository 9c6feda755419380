"""Retention of the shipped students on composed scenes, raw and above chance, with intervals.

Evaluates `scenes-linear`, `scenes-hybrid` and their teacher on both suites with `mmmamba eval`,
and writes the scores as JSON that `mmmamba report --results` reads. Answers are kept in `--run`,
so that the same command goes on after an interrupt.

    python benchmarks/scenes_retention.py --run runs/retention --out scenes_retention_cpu.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.evaluate.result import Retention
from mmmamba_cli.reporting import read_report_data
from mmmamba_cli.reporting.measured_results import AboveChance
from mmmamba_cli.reporting.retention import Kept
from mmmamba_cli.reporting.suite_results import suite_results

TEACHER, STUDENTS = "scenes-teacher", ("scenes-linear", "scenes-hybrid")
SUITES = "scenes,scenes-unseen"


def evaluate(run: Path) -> list[str]:
    """Evaluate all three models; return the command."""
    if not (run / "run.json").is_file():
        mmmamba("seed", TEACHER, "--recipe", "scenes-linear", "--run", str(run), "--no-report")
    models = [word for name in STUDENTS for word in ("--model", name)]
    words = ["eval", "--run", str(run), *models, "--teacher", "--suite", SUITES, "--dtype", "fp32"]
    mmmamba(*words)
    return ["mmmamba", *words]


def mmmamba(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "mmmamba_cli", *words], check=True)


def retention(kept: list[Kept], run: Path) -> list[dict[str, object]]:
    """What `mmmamba eval --teacher` wrote, in the order of `kept`."""
    found = []
    for one in kept:
        file = run / "evals" / one.student / one.suite / "retention.json"
        (part,) = json.loads(file.read_text(encoding="utf-8"))
        found.append(Retention.model_validate(part).model_dump(mode="json"))
    return found


def above_chance(one: Kept, rule: str) -> dict[str, object]:
    assert one.above is not None and one.above.interval is not None and one.chance is not None
    low, high = one.above.interval
    return AboveChance(
        suite=one.suite,
        rule=rule,
        metric=one.metric,
        student=one.student,
        teacher=one.teacher,
        chance=one.chance,
        ratio=one.above.value / 100,
        interval=(low / 100, high / 100),
    ).model_dump(mode="json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of answers")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device-name", required=True, help="the device, in words")
    options = parser.parse_args()
    command = evaluate(options.run)
    suites = suite_results(read_report_data(options.run), None)
    kept = [one for suite in suites for one in suite.kept]
    results = [one.result for suite in suites for one in suite.results]
    value = {
        "format": 1,
        "what": "scores of the shipped students and their teacher on composed scenes",
        "command": shlex.join(["python", "benchmarks/scenes_retention.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": options.device_name,
        "results": [one.model_dump(mode="json") for one in results],
        "retention": retention(kept, options.run),
        "above_chance": [above_chance(one, results[0].rules[0].rule) for one in kept],
    }
    atomic_write_text(options.out, json.dumps(value, indent=1) + "\n")
    print(shlex.join(command))
    for one in kept:
        print(f"{one.suite} {one.student}: {one.raw} % of the score, {one.above} % above chance")


if __name__ == "__main__":
    main()
