"""Effect of int8 weights on answers: a model against its quantized self on shipped suites.

    python benchmarks/int8_quality.py MODEL... [--suites scenes ...] [--limit N] [--out FILE]

MODEL is a checkpoint's folder or the name of a shipped model. Each model answers each suite twice,
as in `mmmamba eval`: with its own weights, and after `inference.quantize`. Prints one JSON object:
scores by the suite's rules, retention with its interval, and the number of changed answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.devices import pick_device
from mmmamba_cli.evaluate import (
    EvalCallbacks,
    EvalOptions,
    ScoredSuite,
    compare_with_teacher,
    evaluate_model,
    find_suite,
    open_suite,
)
from mmmamba_cli.evaluate.model_adapter import load_eval_model
from mmmamba_cli.inference import quantize
from mmmamba_cli.runs import resolve_path
from mmmamba_cli.runs.manifest import package_versions

PREDICTIONS = "predictions.tsv"


def answered(
    model: Any, name: str, options: EvalOptions, folder: Path
) -> tuple[ScoredSuite, list[str]]:
    """The suite's scores, and the lines of its answers."""
    suite = find_suite(name)
    table, rows = open_suite(suite, options, lambda text: print(text, file=sys.stderr))
    scored = evaluate_model(model, suite, table, rows, folder, options, EvalCallbacks())
    return scored, (folder / PREDICTIONS).read_text().splitlines()[1:]


def examine(name: str, given: argparse.Namespace, work: Path) -> dict[str, Any]:
    options = EvalOptions(limit=given.limit, seed=given.seed)
    model = load_eval_model(resolve_path(Path(name)), given.device, given.dtype)
    plain = {
        suite: answered(model, suite, options, work / f"{suite} plain") for suite in given.suites
    }
    quantize(model.model)
    settings = {**model.identity.answers_depend_on, "weights": "int8"}
    model.identity = replace(model.identity, name=f"{name}, int8", answers_depend_on=settings)
    found: dict[str, Any] = {}
    for suite, (before, lines) in plain.items():
        after, new_lines = answered(model, suite, options, work / f"{suite} int8")
        found[suite] = {
            "questions": len(lines),
            "answers_that_changed": sum(a != b for a, b in zip(lines, new_lines, strict=True)),
            "plain": [part.model_dump(mode="json") for part in before.result.rules],
            "int8": [part.model_dump(mode="json") for part in after.result.rules],
            "retention": [
                part.model_dump(mode="json")
                for part in compare_with_teacher([after], before, given.seed)
            ],
        }
        print(name, suite, found[suite]["retention"], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--suites", nargs="+", default=["scenes"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = pick_device(given.device)
    result: dict[str, Any] = {
        "what": "answers of models with int8 weights against those with their own",
        "command": " ".join(["python", "benchmarks/int8_quality.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": package_versions(),
        "seed": given.seed,
        "models": {},
    }
    for name in given.models:
        with tempfile.TemporaryDirectory() as work:
            result["models"][name] = examine(name, given, Path(work))
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
