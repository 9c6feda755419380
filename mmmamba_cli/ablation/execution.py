"""Training, evaluation and the JSON of one cell, resumable at any point."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.ablation.answers import Questions, Texts, write_questions
from mmmamba_cli.ablation.cells import Cell, Trunk
from mmmamba_cli.ablation.plan import WORK, Plan, SuiteUse
from mmmamba_cli.ablation.records import (
    CellRecord,
    ModelRecord,
    RuleRecord,
    StageRecord,
    SuiteRecord,
    Timing,
    write_record,
)
from mmmamba_cli.ablation.run_folders import copy_run, prune_run
from mmmamba_cli.checkpoint import atomic_write_text, open_checkpoint, parse_dtype
from mmmamba_cli.devices import pick_device
from mmmamba_cli.distill import DistillOptions, Progress, StageCallbacks, StepResult, read_metrics
from mmmamba_cli.distill.metrics import METRICS
from mmmamba_cli.distill.pipeline import distill
from mmmamba_cli.distill.trainer import Stopped
from mmmamba_cli.distributed import join_world
from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate import EvalCallbacks, EvalOptions, evaluate_model, find_suite, open_suite
from mmmamba_cli.evaluate.fingerprint import library_versions
from mmmamba_cli.evaluate.model_adapter import HolisticVLMAdapter, load_eval_model
from mmmamba_cli.evaluate.result import EVALS, PREDICTIONS, ScoredSuite
from mmmamba_cli.recipe import Recipe, Stage, dump_recipe
from mmmamba_cli.runs import Manifest, ResolvedModel, Run, resolve_path, resolve_product
from mmmamba_cli.runs.manifest import utc_timestamp
from mmmamba_cli.runs.provenance import redact_recipe
from mmmamba_cli.seed import seed_student

RECIPE_FILE = "recipe.yaml"
COMMANDS_DONE, COMMANDS_LOG = "commands.json", "commands.log"
# Seconds between looks at a command that runs.
POLL_SECONDS = 0.2


class CellStopped(Exception):
    """The runner asked to stop; what was done is saved."""


@dataclass(frozen=True)
class Control:
    """Functions of the runner that a cell calls.

    `progress` takes what is being done, the number done and the total.
    """

    should_stop: Callable[[], bool]
    say: Callable[[str], None]
    progress: Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setting:
    """Folders and options that all cells share; `jobs` cells run at the same time."""

    plan: Plan
    out: Path
    work: Path
    device: str | None
    keep: tuple[str, ...]
    jobs: int


class CellExecutor:
    """Runs cells and trunks; opened suites are shared by the cells."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._suites: dict[SuiteUse, Any] = {}

    def run_trunk(self, trunk: Trunk, control: Control) -> None:
        """Train the stages of a trunk, from those of its parent.

        Raises:
            CellStopped: the runner asked to stop; the state has been saved.
            MmmambaError: as `distill` and `seed` do.
        """
        run = Run(self.setting.work / trunk.folder)
        self._begin(run, trunk.recipe, trunk.parent)
        self._train(run, trunk.recipe, trunk.stages, control)

    def run_cell(self, cell: Cell, parent: Trunk | None, control: Control) -> CellRecord:
        """Train and evaluate a cell and write its JSON; raises as `run_trunk` does."""
        started = time.perf_counter()
        run = Run(self.setting.work / cell.folder)
        if cell.recipe is None:
            resolved = resolve_path(Path(self.setting.plan.teacher))
        else:
            self._begin(run, cell.recipe, parent)
            self._train(run, cell.recipe, cell.stages, control)
            self._run_commands(run, cell, control)
            resolved = resolve_product(run)
        suites, seconds = self._evaluate(run, cell, resolved, control)
        stages = [] if cell.recipe is None else _chain(run, resolved.name)
        record = CellRecord(
            plan=self.setting.plan.name,
            cell=cell.name,
            arm=cell.arm,
            seed=cell.seed,
            digest=cell.digest,
            status="finished",
            commands=tuple(commands_of(self.setting.plan, cell)),
            **_recipe_fields(cell),
            model=_model(resolved, run),
            stages=tuple(_stage(run, product) for product in stages),
            suites=tuple(suites),
            device=device_name(self.setting.device),
            versions=library_versions(),
            timing=Timing(
                date=utc_timestamp(),
                seconds=round(time.perf_counter() - started, 1),
                stages={p.stages[-1]: round(p.metrics["seconds"], 2) for p in stages},
                suites=seconds,
                jobs=self.setting.jobs,
            ),
        )
        write_record(self.setting.out, cell, record)
        prune_run(run.folder, self.setting.keep, resolved.name)
        return record

    def _begin(self, run: Run, recipe: Recipe, parent: Trunk | None) -> None:
        """Seed a run, or copy that of the trunk, unless it has begun."""
        if not run.exists:
            if parent is not None:
                copy_run(self.setting.work / parent.folder, run.folder)
            else:
                teacher = open_checkpoint(Path(self.setting.plan.teacher))
                dtype = parse_dtype(self.setting.plan.dtype)
                with run.lock():
                    seed_student(run, teacher, recipe, dtype=dtype, overwrite=True, discard=True)
        atomic_write_text(run.folder / RECIPE_FILE, dump_recipe(recipe))

    def _train(self, run: Run, recipe: Recipe, stages: Sequence[str], control: Control) -> None:
        """Run the stages that the run has not done."""
        wanted = [s for s in stages if s not in run.product(run.record.current).stages]
        if not wanted:
            return
        totals = {stage.name: stage.steps for stage in recipe.stages}
        current = wanted[0]

        def begin(stage: Stage, trainable: Mapping[str, Tensor], progress: Progress) -> None:
            nonlocal current
            current = stage.name
            control.progress(current, progress.step, totals[current])

        def step(result: StepResult) -> None:
            if result.skipped is not None:
                control.say(f"{current}: step {result.step} skipped: {result.skipped}")
            control.progress(current, result.step, totals[current])

        callbacks = StageCallbacks(lambda text: None, begin, step, control.should_stop)
        try:
            with run.lock_existing(), join_world(self.setting.device) as world:
                distill(run, recipe, world, callbacks, wanted=wanted, options=DistillOptions())
        except Stopped as error:
            raise CellStopped from error
        if control.should_stop():
            raise CellStopped

    def _run_commands(self, run: Run, cell: Cell, control: Control) -> None:
        """Run the arm's own commands that are not done."""
        file = run.folder / COMMANDS_DONE
        done = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0
        places = self._places(run, cell)
        for number, command in enumerate(cell.commands[done:], start=done + 1):
            control.progress(f"command {number}", number - 1, len(cell.commands))
            run_mmmamba(fill(command, places), run.folder / COMMANDS_LOG, control.should_stop)
            atomic_write_text(file, f"{number}\n")

    def _places(self, run: Run, cell: Cell) -> dict[str, str]:
        return {
            "{run}": str(run.folder),
            "{recipe}": str(run.folder / RECIPE_FILE),
            "{seed}": str(cell.seed),
            WORK: str(self.setting.work),
        }

    def _evaluate(
        self, run: Run, cell: Cell, resolved: ResolvedModel, control: Control
    ) -> tuple[list[SuiteRecord], dict[str, float]]:
        """The results of all suites, and the seconds of each."""
        found: list[SuiteRecord] = []
        seconds: dict[str, float] = {}
        if not cell.suites:
            return found, seconds
        model = load_eval_model(resolved, self.setting.device)
        for use in cell.suites:
            started = time.perf_counter()
            found.append(self._evaluate_suite(model, use, run.folder / EVALS / use.title, control))
            seconds[use.title] = round(time.perf_counter() - started, 2)
        return found, seconds

    def _evaluate_suite(
        self, model: HolisticVLMAdapter, use: SuiteUse, folder: Path, control: Control
    ) -> SuiteRecord:
        options = EvalOptions(
            data=None if use.data is None else Path(use.data),
            limit=use.limit,
            batch=use.batch,
            max_tiles=use.max_tiles,
            max_new_tokens=use.max_new_tokens,
            by_likelihood=use.answers == "likelihood",
        )
        if use not in self._suites:
            suite = find_suite(use.name)
            self._suites[use] = (suite, *open_suite(suite, options, control.say))
        suite, table, rows = self._suites[use]
        answered = 0

        def advance(more: int) -> None:
            nonlocal answered
            answered += more
            control.progress(use.title, answered, len(rows))
            if control.should_stop():
                raise CellStopped

        callbacks = EvalCallbacks(say=lambda text: None, warn=control.say, advance=advance)
        scored = evaluate_model(model, suite, table, rows, folder, options, callbacks)
        return _suite_record(use, scored, folder, self.setting.out)


def run_mmmamba(words: Sequence[str], log: Path, should_stop: Callable[[], bool]) -> None:
    """Run a command of mmmamba in a process of its own; its output is appended to `log`.

    Raises:
        CellStopped: `should_stop` returned True; the command was asked to save and stop.
        RunError: the command failed; the message has its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as handle:
        process = subprocess.Popen(  # noqa: S603  words of the plan, without a shell
            [sys.executable, "-m", "mmmamba_cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        stopping = False
        while process.poll() is None:
            if should_stop() and not stopping:
                stopping = True
                process.terminate()
            time.sleep(POLL_SECONDS)
    if process.returncode == 0:
        return
    if stopping:
        raise CellStopped
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it wrote nothing"
    raise RunError(
        f"mmmamba {shlex.join(words)} ended with exit code {process.returncode}: {last}",
        f"its output is in {log}",
    )


def fill(command: str, places: Mapping[str, str]) -> list[str]:
    """The words of a command with its placeholders replaced."""
    words = shlex.split(command)
    for name, value in places.items():
        words = [word.replace(name, value) for word in words]
    return words


def commands_of(plan: Plan, cell: Cell) -> list[str]:
    """The commands that do by hand what a cell does; RUN and RECIPE stand for its files."""
    suites = ",".join(use.name for use in cell.suites)
    if cell.recipe is None:
        teacher = Path(plan.teacher).name
        return [f"mmmamba eval --model {teacher} --suite {suites}"] if suites else []
    found = [
        f"mmmamba seed {Path(plan.teacher).name} --run RUN --recipe RECIPE --dtype {plan.dtype}"
    ]
    if cell.stages:
        stages = ",".join(cell.stages)
        found.append(f"mmmamba distill --run RUN --recipe RECIPE --stage {stages}")
    names = {"{run}": "RUN", "{recipe}": "RECIPE", "{seed}": str(cell.seed), WORK: "WORK"}
    found += [f"mmmamba {shlex.join(fill(command, names))}" for command in cell.commands]
    return found + ([f"mmmamba eval --run RUN --suite {suites}"] if suites else [])


def device_name(device: str | None) -> str:
    """The name of the GPU, or CPU."""
    chosen = pick_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU"


def _recipe_fields(cell: Cell) -> dict[str, Any]:
    if cell.recipe is None:
        return {}
    text = redact_recipe(dump_recipe(cell.recipe))
    return {"recipe": text, "recipe_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _model(resolved: ResolvedModel, run: Run) -> ModelRecord:
    if resolved.origin != "product":
        return ModelRecord(
            product=resolved.name,
            kind="teacher",
            content_hash=resolved.content_hash or resolved.checkpoint.source.content_hash(),
        )
    product = run.product(resolved.name)
    parent = product.derived_from
    return ModelRecord(
        product=product.name,
        kind=product.kind,
        content_hash=product.content_hash,
        parameters=product.parameters,
        parent=None if parent is None else (parent.name, parent.content_hash),
        attention_layers=product.attention_layers,
        data=product.data,
    )


def _chain(run: Run, name: str) -> list[Manifest]:
    """The products of the stages that a product has been through, the first stage first."""
    product = run.product(name)
    line = [product, *(one for _, one in run.ancestors(product))]
    return [one for one in reversed(line) if one.made_by == "distill"]


def _stage(run: Run, product: Manifest) -> StageRecord:
    rows = list(read_metrics(run.product_folder(product.name) / METRICS))
    held_out = [
        {"step": row["step"]}
        | {k.removeprefix("held_out/"): v for k, v in row.items() if k.startswith("held_out/")}
        for row in rows
        if "held_out/loss" in row
    ]
    loss = rows[-1]["loss"] if rows else None
    return StageRecord(
        name=product.stages[-1],
        product=product.name,
        steps=product.metrics["step"],
        tokens=product.metrics["tokens"],
        samples=product.metrics["samples"],
        loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        held_out=tuple(held_out),
    )


def _suite_record(use: SuiteUse, scored: ScoredSuite, folder: Path, out: Path) -> SuiteRecord:
    """The answers of a cell as its JSON has them.

    Raises `RunError` if the scores do not follow from them: its comparisons would be wrong.
    """
    result = scored.result
    with (folder / PREDICTIONS).open(encoding="utf-8", newline="") as handle:
        given = [row["prediction"] for row in csv.DictReader(handle, delimiter="\t")]
    answers = Texts.of(given)
    questions = Questions.of(result.suite, scored.rows)
    rules = []
    for part in result.rules:
        again = questions.scores(part.scoring, answers).values()
        if again != part.metrics:
            raise RunError(
                f"suite {use.title}: its rule {part.rule} needs more than the right answers, "
                "categories and options of its rows, so that cells cannot be compared",
                "name another rule of the suite"
                if len(result.rules) > 1
                else "leave the suite out of the plan",
            )
        rules.append(
            RuleRecord(
                rule=part.rule,
                scoring=part.scoring,
                metric=part.metric,
                metrics=part.metrics,
                intervals=part.intervals,
            )
        )
    return SuiteRecord(
        label=use.title,
        suite=result.suite,
        version=result.version,
        suite_digest=result.suite_digest,
        data_sha256=result.data.sha256,
        asked=result.data.used,
        not_asked=len(result.not_asked),
        questions=write_questions(out, questions),
        answers=answers,
        correct=questions.correct(rules[0].scoring, answers) if rules else "",
        settings=result.settings,
        rules=tuple(rules),
    )
