"""Run directories of cells: copies of shared ones, and what is removed from finished ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint.atomic_writes import atomic_folder
from mmmamba_cli.evaluate.result import EVALS
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.run import PRODUCTS, RUN_RECORD

# Values of `keep` that are no names of products.
ALL, NONE, EVALUATED = "all", "none", "evaluated"
KEEP_WORDS = (EVALUATED, ALL, NONE)
TRAINING, STATE_FILE = "training", "state.json"


def copy_run(source: Path, target: Path) -> None:
    """Copy the record and products of a run, by hard links where the file system has them.

    Files of products are replaced and never changed, so that links are safe.
    """
    with atomic_folder(target, overwrite=True) as partial:
        shutil.copytree(source / PRODUCTS, partial / PRODUCTS, copy_function=_link)
        shutil.copy2(source / RUN_RECORD, partial / RUN_RECORD)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links.
        shutil.copy2(source, target)


def prune_run(folder: Path, keep: Sequence[str], evaluated: str | None) -> None:
    """Remove training states, and the products that `keep` does not name; repeatable.

    `evaluated` is the product that was evaluated, None for the teacher. Without any product left,
    the folder goes.
    """
    if not folder.is_dir():
        return
    products = folder / PRODUCTS
    there = [path for path in products.iterdir() if path.is_dir()] if products.is_dir() else []
    if ALL in keep:
        kept = [path.name for path in there]
    else:
        kept = [name for name in keep if (products / name).is_dir()]
        if EVALUATED in keep and evaluated in {path.name for path in there}:
            assert evaluated is not None
            kept.append(evaluated)
    if not kept:
        shutil.rmtree(folder)
        return
    run = Run(folder)
    if run.record.current not in kept:
        run.set_current(kept[-1])
    for path in [folder / TRAINING, folder / "tensorboard", *there]:
        if path.is_dir() and (path not in there or path.name not in kept):
            shutil.rmtree(path)


def has_product(folder: Path, name: str, content_hash: str) -> bool:
    """Whether the run in a folder has a product of that name and content."""
    run = Run(folder)
    found = run.products().get(name) if run.exists else None
    return found is not None and found.content_hash == content_hash


@dataclass(frozen=True)
class RunState:
    """Where a run stands: stages done, and what is measured and kept of the others.

    `saved_steps` are those of the newest state of a stage that is not done, `step_seconds` the
    seconds of a step, evaluations excluded, `answers` the number of kept answers to each suite.
    """

    done: tuple[str, ...] = ()
    saved_steps: Mapping[str, int] = field(default_factory=dict)
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, int] = field(default_factory=dict)


def read_run_state(folder: Path) -> RunState:
    """Read how far a run has come, and how long its steps took.

    No process of this runner may write to it meanwhile.
    """
    run = Run(folder)
    # The teacher's cell has answers only.
    answers = {path.name: num_answers(folder, path.name) for path in (folder / EVALS).glob("*")}
    if not run.exists:
        return RunState(answers=answers)
    done = run.product(run.record.current).stages
    saved: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for product in run.products().values():
        if product.made_by == "distill":
            _add_rate(seconds, product.stages[-1], product.metrics)
    for file in sorted((folder / TRAINING).glob(f"*/step-*/{STATE_FILE}")):
        try:
            state = json.loads(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            # A process of a killed runner has saved a newer state.
            continue
        stage = state["settings"]["stage"]["name"]
        # The states of a stage that was done in a killed process may still be there.
        if stage not in done:
            saved[stage] = state["progress"]["step"]
            _add_rate(seconds, stage, state["progress"])
    return RunState(done, saved, seconds, answers)


def _add_rate(seconds: dict[str, float], stage: str, progress: Mapping[str, Any]) -> None:
    """Add the seconds of a step from the progress of a stage, if any step is measured."""
    if progress.get("step") and progress.get("seconds"):
        seconds[stage] = progress["seconds"] / progress["step"]


def num_answers(folder: Path, suite: str) -> int:
    """The answers to a suite that an unfinished evaluation of a run has kept."""
    files = (folder / EVALS / suite).glob("predictions-*.jsonl")
    return max((file.read_bytes().count(b'\n{"index"') for file in files), default=0)
