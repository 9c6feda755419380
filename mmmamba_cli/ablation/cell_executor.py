"""Training, evaluation and the JSON of one cell, resumable at any point."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mmmamba_cli.ablation.cell_record import (
    CellRecord,
    LaterAnswers,
    SuiteRecord,
    Timing,
    finished_records,
    missing_suites,
    read_records,
    write_record,
)
from mmmamba_cli.ablation.cells import Cell, SharedStages
from mmmamba_cli.ablation.commands import CommandStopped, commands_of, fill_placeholders
from mmmamba_cli.ablation.own_commands import run_own_commands
from mmmamba_cli.ablation.plan import WORK, Plan, SuiteUse
from mmmamba_cli.ablation.record_builder import (
    device_name,
    model_record,
    recipe_fields,
    stage_products,
    stage_record,
    suite_record,
)
from mmmamba_cli.ablation.run_folders import copy_run, num_answers, prune_run
from mmmamba_cli.checkpoint import (
    InPlaceCheckpoint,
    atomic_write_text,
    open_any_checkpoint,
    parse_dtype,
)
from mmmamba_cli.distill import DistillOptions, Progress, StageCallbacks, StepResult
from mmmamba_cli.distill.pipeline import distill
from mmmamba_cli.distill.trainer import Stopped
from mmmamba_cli.distributed import join_world
from mmmamba_cli.errors import RecipeError, RunError
from mmmamba_cli.evaluate import (
    EvalCallbacks,
    EvalModel,
    EvalOptions,
    evaluate_model,
    find_suite,
    open_suite,
)
from mmmamba_cli.evaluate.fingerprint import library_versions
from mmmamba_cli.evaluate.model_adapter import load_eval_model
from mmmamba_cli.evaluate.result import EVALS
from mmmamba_cli.hybridize import LayerSelection
from mmmamba_cli.layer_selection import SelectionCallbacks, select_planned_layers
from mmmamba_cli.recipe import Recipe, Stage, dump_recipe
from mmmamba_cli.runs import Manifest, ResolvedModel, Run, resolve_path, resolve_product
from mmmamba_cli.runs.manifest import utc_timestamp
from mmmamba_cli.seed import seed_in_place, seed_student
from mmmamba_cli.teachers import bidirectional_warning

RECIPE_FILE = "recipe.yaml"
# Seconds between attempts to lock a run.
POLL_SECONDS = 0.2
# Seconds to wait for processes of a killed runner, which save and stop.
LOCK_SECONDS = 60.0


class CellStopped(Exception):
    """The runner asked to stop; what was done is saved."""


@dataclass(frozen=True)
class Control:
    """Functions of the runner that a cell calls.

    `progress` takes what is being done, the number done and the total. `memory_share` is the share
    of the device's memory that the cell may plan with; others have the rest.
    """

    should_stop: Callable[[], bool]
    say: Callable[[str], None]
    progress: Callable[[str, int, int], None]
    memory_share: float = 1.0


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
    """Runs cells and shared stages; opened suites are shared by the cells."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._suites: dict[SuiteUse, Any] = {}
        # Seconds of the optimiser steps of the unit that runs, in this process.
        self._step_seconds = 0.0

    def train_shared_stages(self, shared: SharedStages, control: Control) -> None:
        """Train shared stages, from those of their parent.

        Raises:
            CellStopped: the runner asked to stop; the state has been saved.
            MmmambaError: as `distill` and `seed` do.
        """
        run = Run(self.setting.work / shared.folder)
        self._begin(run, shared.recipe, shared.parent, control)
        self._train(run, shared.recipe, shared.stages, control)

    def run_cell(self, cell: Cell, parent: SharedStages | None, control: Control) -> CellRecord:
        """Train and evaluate a cell and write its JSON; raises as `train_shared_stages` does.

        A finished cell whose plan has gained suites is evaluated on these alone.
        """
        known, _ = read_records(self.setting.out, [cell])
        if finished_records(known):
            return self._complete(cell, known[cell.name], control)
        started = time.perf_counter()
        self._step_seconds = 0.0
        run = Run(self.setting.work / cell.folder)
        if cell.recipe is None:
            resolved = resolve_path(Path(self.setting.plan.teacher))
        else:
            self._begin(run, cell.recipe, parent, control)
            self._train(run, cell.recipe, cell.stages, control)
            self._run_commands(run, cell, control)
            resolved = resolve_product(run)
        resumed = {use.title for use in cell.suites if num_answers(run.folder, use.title)}
        suites, seconds = self._evaluate(run, cell, resolved, control)
        stages = [] if cell.recipe is None else stage_products(run, resolved.name)
        other = time.perf_counter() - started - self._step_seconds - sum(seconds.values())
        record = CellRecord(
            plan=self.setting.plan.name,
            cell=cell.name,
            arm=cell.arm,
            seed=cell.seed,
            digest=cell.digest,
            status="finished",
            commands=tuple(commands_of(self.setting.plan, cell)),
            **recipe_fields(cell),
            model=model_record(resolved, run),
            stages=tuple(stage_record(run, product) for product in stages),
            suites=tuple(suites),
            device=device_name(self.setting.device),
            versions=library_versions(),
            timing=Timing(
                date=utc_timestamp(),
                other=round(max(0.0, other), 2),
                stages={p.stages[-1]: round(p.metrics["seconds"], 2) for p in stages},
                suites={label: seconds[label] for label in seconds if label not in resumed},
                jobs=self.setting.jobs,
            ),
        )
        write_record(self.setting.out, cell, record)
        prune_run(run.folder, self.setting.keep, resolved.name)
        return record

    def _complete(self, cell: Cell, record: CellRecord, control: Control) -> CellRecord:
        """Add the answers to suites that the record lacks.

        Raises `RunError` if the model is not the one of the record.
        """
        run = Run(self.setting.work / cell.folder)
        assert record.model is not None
        if cell.recipe is None:
            resolved = resolve_path(Path(self.setting.plan.teacher))
        else:
            resolved = resolve_product(run, record.model.product)
        if model_record(resolved, run).content_hash != record.model.content_hash:
            raise RunError(
                f"the model of {cell.name} has other contents than the one that was evaluated",
                f"remove {cell.name}.json to run the cell again",
            )
        missing = replace(cell, suites=missing_suites(cell, record))
        added, seconds = self._evaluate(run, missing, resolved, control)
        suites = {suite.label: suite for suite in record.suites}
        for suite in added:
            later = LaterAnswers(
                date=utc_timestamp(),
                device=device_name(self.setting.device),
                versions=library_versions(),
                seconds=seconds[suite.label],
            )
            suites[suite.label] = suite.model_copy(update={"later": later})
        completed = record.model_copy(
            update={
                "digest": cell.digest,
                "commands": tuple(commands_of(self.setting.plan, cell)),
                "suites": tuple(suites[use.title] for use in cell.suites),
            }
        )
        write_record(self.setting.out, cell, completed)
        prune_run(run.folder, self.setting.keep, resolved.name if cell.recipe else None)
        return completed

    def _begin(
        self, run: Run, recipe: Recipe, parent: SharedStages | None, control: Control
    ) -> None:
        """Seed a run, or copy that of the shared stages, unless it has begun."""
        self._step_seconds = 0.0
        if not run.exists:
            if parent is not None:
                copy_run(self.setting.work / parent.folder, run.folder)
            else:
                with lock_when_free(run, control):
                    self._seed(run, recipe)
        atomic_write_text(run.folder / RECIPE_FILE, dump_recipe(recipe))

    def _seed(self, run: Run, recipe: Recipe) -> None:
        """Seed a run with a student of the plan's teacher, of whatever kind it is."""
        plan = self.setting.plan
        teacher, dtype = open_any_checkpoint(Path(plan.teacher)), parse_dtype(plan.dtype)
        if not isinstance(teacher, InPlaceCheckpoint):
            seed_student(run, teacher, recipe, dtype=dtype, overwrite=True, discard=True)
            return
        if bidirectional_warning(teacher.config) is not None and not plan.allow_bidirectional:
            raise RecipeError(
                f"image tokens of the teacher {plan.teacher} attend to each other in both "
                "directions, and a mixer reads them in order",
                "convert it nevertheless with allow_bidirectional: true in the plan",
            )
        seed_in_place(
            run,
            teacher,
            recipe,
            dtype=dtype,
            overwrite=True,
            discard=True,
            allow_bidirectional=plan.allow_bidirectional,
        )

    def _train(self, run: Run, recipe: Recipe, stages: Sequence[str], control: Control) -> None:
        """Run the stages that the run has not done.

        Raises `CellStopped` after saving the state, or between stages.
        """
        done = run.product(run.record.current).stages
        wanted = [stage for stage in stages if stage not in done]
        if not wanted:
            return
        totals = {stage.name: stage.steps for stage in recipe.stages}
        current = wanted[0]

        def begin(stage: Stage, trainable: Mapping[str, Tensor], progress: Progress) -> None:
            nonlocal current
            current = stage.name
            control.progress(current, progress.step, totals[current])

        def step(result: StepResult) -> None:
            self._step_seconds += result.tokens / result.tokens_per_second if result.tokens else 0.0
            if result.skipped is not None:
                control.say(f"{current}: step {result.step} skipped: {result.skipped}")
            control.progress(current, result.step, totals[current])

        callbacks = StageCallbacks(lambda text: None, begin, step, control.should_stop)
        try:
            with lock_when_free(run, control), join_world(self.setting.device) as world:
                distill(
                    run,
                    recipe,
                    world,
                    callbacks,
                    wanted=wanted,
                    options=DistillOptions(memory_share=control.memory_share),
                    select=partial(self._select_layers, control),
                )
        except Stopped as error:
            raise CellStopped from error
        if control.should_stop():
            raise CellStopped

    def _select_layers(
        self, control: Control, run: Run, recipe: Recipe, product: Manifest
    ) -> LayerSelection:
        """The attention layers of a recipe with `layers.select`."""

        @contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
            done = 0

            def advance(more: int) -> None:
                nonlocal done
                done += more
                control.progress(title, done, total)

            control.progress(title, 0, total)
            yield advance

        callbacks = SelectionCallbacks(progress=progress)
        return select_planned_layers(run, recipe, product, callbacks, device=self.setting.device)

    def _run_commands(self, run: Run, cell: Cell, control: Control) -> None:
        """Run the arm's own commands that are not done."""
        places = self._places(run, cell)
        try:
            run_own_commands(
                run,
                [fill_placeholders(command, places) for command in cell.commands],
                control.should_stop,
                control.progress,
                lambda: lock_when_free(run, control),
            )
        except CommandStopped as error:
            raise CellStopped from error

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
        self, model: EvalModel, use: SuiteUse, folder: Path, control: Control
    ) -> SuiteRecord:
        options = EvalOptions(
            data=None if use.data is None else Path(use.data),
            limit=use.limit,
            batch=use.batch,
            max_tiles=use.max_tiles,
            max_new_tokens=use.max_new_tokens,
            by_likelihood=use.is_by_likelihood,
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
        return suite_record(use, scored, folder, self.setting.out)


@contextmanager
def lock_when_free(run: Run, control: Control) -> Iterator[None]:
    """Lock a run, after a wait for processes of a killed runner that still save it.

    Raises `RunError` if it is still in use after `LOCK_SECONDS`.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run.lock())
                break
            except RunError:
                if time.monotonic() >= deadline or control.should_stop():
                    raise
                time.sleep(POLL_SECONDS)
        yield
