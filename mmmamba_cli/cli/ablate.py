"""`mmmamba ablate`: run the cells of a plan, and print their tables."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.console import (
    if_interrupted,
    print_json,
    print_line,
    print_table,
    print_warning,
)
from mmmamba_cli.cli.options import AsJson, Device, Sets
from mmmamba_cli.errors import MmmambaError, RunError, name_some

if TYPE_CHECKING:
    from mmmamba_cli.ablation.cells import Cell
    from mmmamba_cli.ablation.plan import Plan
    from mmmamba_cli.ablation.plan_progress import PlanProgress
    from mmmamba_cli.ablation.runner import Outcome
    from mmmamba_cli.ablation.unit_queue import TimeLimit

FAILED, INTERRUPTED = 2, 130


def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="YAML file of the plan.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of results, one JSON per cell (default: the plan's, else "
            "benchmarks/results/evidence/NAME).",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of run directories (default: runs/ablations/NAME)."
        ),
    ] = None,
    sets: Sets = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN,...", help="Cells or arms to run, such as attn-*,*-seed0."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            metavar="M",
            help="Time limit: save and stop before it. Begin a cell that cannot end before it only "
            "if 2 minutes or a tenth of its steps and answers can be done and saved.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Cells to run side by side, as processes.")
    ] = 1,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Products to keep of a finished cell: names, evaluated, all or none (default: "
            "the plan's).",
        ),
    ] = None,
    device: Device = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace results that were made with other settings of the plan."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells with their estimated time.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Print the tables of the results instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a plan of experiments: arms, seeds and suites.

    A cell is one arm with one seed. Runs the cells that have no result, and writes one JSON for
    each. Stages that several cells share are trained once. Resumes an interrupted plan.
    """
    from mmmamba_cli.ablation import expand, load_plan
    from mmmamba_cli.ablation.cells import check_keep, select
    from mmmamba_cli.ablation.plan_progress import find_progress
    from mmmamba_cli.ablation.preparation import resolve_folders
    from mmmamba_cli.ablation.unit_queue import TimeLimit

    started = time.monotonic()
    loaded = load_plan(plan)
    results, folder = resolve_folders(loaded, out, work)
    cells = expand(loaded, sets or (), str(folder))
    chosen = select(cells, only)
    kept = loaded.keep if keep is None else tuple(n.strip() for n in keep.split(",") if n.strip())
    check_keep(kept, cells)
    if table:
        _print_tables(loaded, results, cells, as_json)
        return
    progress = find_progress(results, folder, cells, chosen, retry=retry, overwrite=overwrite)
    if dry_run:
        _print_cells(loaded, progress, chosen, folder, jobs, as_json)
        return
    limit = None if minutes is None else TimeLimit(60 * minutes, started)
    outcome = _run(loaded, progress, results, folder, kept, device=device, limit=limit, jobs=jobs)
    _report(progress, outcome, results, as_json)


def _run(
    plan: Plan,
    progress: PlanProgress,
    out: Path,
    work: Path,
    keep: tuple[str, ...],
    *,
    device: str | None,
    limit: TimeLimit | None,
    jobs: int,
) -> Outcome:
    """Lock both folders, make missing data, and run the pending cells."""
    from mmmamba_cli.ablation.preparation import check_data, check_suites, folder_lock
    from mmmamba_cli.ablation.runner import Outcome, RunnerEvents, remove_unneeded, run_plan
    from mmmamba_cli.cli.ablate_display import AblationDisplay
    from mmmamba_cli.cli.stop_request import StopRequest

    with ExitStack() as stack:
        stack.enter_context(folder_lock(out))
        stack.enter_context(folder_lock(work))
        remove_unneeded(progress, None, work, keep)
        if not progress.pending:
            return Outcome()
        stack.enter_context(if_interrupted(f"results are in {out}; run the same command to go on"))
        _prepare(plan, progress.pending, work)
        check_data(progress.pending)
        check_suites(progress.suites, lambda text: print_line(text, to_stderr=True))
        from mmmamba_cli.ablation.cell_executor import Setting
        from mmmamba_cli.ablation.pools import InlinePool, ProcessPool

        stop = stack.enter_context(StopRequest())
        display = stack.enter_context(AblationDisplay())
        setting = Setting(plan, out, work, device, keep, jobs)
        make = InlinePool if jobs == 1 else ProcessPool
        pool = make(setting, display.say, display.report, lambda: stop.received)
        stack.callback(pool.close)
        events = RunnerEvents(display.say, display.update, lambda: stop.received)
        return run_plan(
            plan,
            progress,
            pool,
            out=out,
            work=work,
            keep=keep,
            jobs=jobs,
            limit=limit,
            events=events,
        )


def _prepare(plan: Plan, cells: Sequence[Cell], work: Path) -> None:
    """Make the data that the cells need and that do not exist."""
    from mmmamba_cli.ablation.preparation import preparations

    for path, words in preparations(plan, cells, work):
        from mmmamba_cli.ablation.commands import fill_placeholders, run_mmmamba
        from mmmamba_cli.ablation.plan import WORK

        made = fill_placeholders(words, {"{path}": str(path), WORK: str(work)})
        print_line(f"making {path}: mmmamba {shlex.join(made)}", to_stderr=True)
        run_mmmamba(made, work / "prepare.log", lambda: False)
        if not path.exists():
            raise RunError(
                f"mmmamba {shlex.join(made)} did not make {path}",
                "correct the section prepare of the plan",
            )


def _report(progress: PlanProgress, outcome: Outcome, out: Path, as_json: bool) -> None:
    """Print what was done, and raise for cells that failed now or before."""
    failed = {
        name: one.error or ""
        for name, one in progress.records.items()
        if one.status == "failed" and name not in outcome.finished
    }
    failed |= outcome.failed
    error = _failure(failed, out)
    if as_json:
        print_json(
            {
                "out": str(out),
                "finished": outcome.finished,
                "failed": failed,
                "left": outcome.left,
                "too_long": outcome.too_long,
                "out_of_memory": outcome.out_of_memory,
                "trained": outcome.trained,
                "lacking": {name: list(labels) for name, labels in progress.lacking.items()},
                "stopped": outcome.stopped,
                **({"error": error.message, "hint": error.hint} if error else {}),
            }
        )
        if error is not None:
            raise typer.Exit(FAILED)
    else:
        shared = f", {len(outcome.trained)} shared trainings" if outcome.trained else ""
        done = f"{len(outcome.finished)} cells finished{shared}"
        print_line(f"{done}, {len(outcome.left)} cells left: {out}")
        if outcome.too_long:
            print_warning(f"not begun, too little time was left: {name_some(outcome.too_long)}")
        if outcome.out_of_memory:
            print_warning(
                "ran out of memory beside others and could not run again in the time: "
                f"{name_some(outcome.out_of_memory)}; a smaller --jobs gives them more"
            )
        if progress.lacking:
            print_warning(_lacking_note(progress.lacking))
        if outcome.left:
            print_line("next: run the same command to go on")
    if error is not None:
        raise error
    if outcome.stopped:
        raise typer.Exit(INTERRUPTED)


def _failure(failed: Mapping[str, str], out: Path) -> MmmambaError | None:
    """The error of a command whose cells failed, by name with their messages; None without any."""
    from mmmamba_cli.ablation.cell_record import first_sentence

    if not failed:
        return None
    shown = list(failed.items())[:3]
    named = "; ".join(f"{name}: {first_sentence(text)}" for name, text in shown)
    return MmmambaError(
        f"{len(failed)} cells failed: {named}" + ("; ..." if len(failed) > 3 else ""),
        f"whole messages are in {out / 'CELL.json'}; run these cells again with --retry",
    )


def _lacking_note(lacking: Mapping[str, Sequence[str]]) -> str:
    labels = list(dict.fromkeys(label for found in lacking.values() for label in found))
    return (
        f"without answers to {', '.join(labels)}, which the plan has gained, since their products "
        f"are gone: {name_some(sorted(lacking))}; a cell is trained again if its JSON is removed"
    )


def _print_cells(
    plan: Plan, progress: PlanProgress, chosen: list[Cell], work: Path, jobs: int, as_json: bool
) -> None:
    from mmmamba_cli.ablation.cells import Cell
    from mmmamba_cli.ablation.estimates import Estimator
    from mmmamba_cli.ablation.plan_progress import estimates, units_to_run

    units = [unit for unit, _ in units_to_run(progress)]
    records = progress.records.values()
    estimator = Estimator(plan.estimates, records, work=work, jobs=jobs, units=units)
    found = estimates(progress, estimator)
    done = {name: one.status for name, one in progress.records.items()}
    waiting = {cell.name for cell in progress.pending}
    rows: list[dict[str, Any]] = [
        {
            "cell": cell.name,
            "state": "lacks suites" if cell.name in progress.lacking else done[cell.name],
            "stages": list(cell.stages),
            "seconds": None,
        }
        for cell in chosen
        if cell.name not in waiting
    ]
    for unit, seconds in found:
        state = "to run" if isinstance(unit, Cell) else "shared"
        if done.get(unit.name) == "finished":
            state = "to complete"
        rows.append(
            {"cell": unit.name, "state": state, "stages": list(unit.stages), "seconds": seconds}
        )
    known = [seconds for _, seconds in found if seconds is not None]
    total = sum(known) if len(known) == len(found) else None
    if as_json:
        print_json({"cells": rows, "seconds": total})
        return
    shown = [
        (
            row["cell"],
            row["state"],
            ", ".join(row["stages"]) or None,
            None if row["seconds"] is None else f"{row['seconds'] / 60:.1f}",
        )
        for row in rows
    ]
    print_table(("cell", "state", "stages", "minutes"), shown, right=("minutes",))
    estimate = (
        "unknown: no cell has been measured" if total is None else f"{total / 60:.1f} minutes"
    )
    if progress.lacking:
        print_line(_lacking_note(progress.lacking))
    print_line(f"{len(progress.pending)} cells to run, one at a time: {estimate}")


def _print_tables(plan: Plan, out: Path, cells: list[Cell], as_json: bool) -> None:
    from mmmamba_cli.ablation.tables import plan_tables

    tables, notes = plan_tables(plan, out, cells)
    if as_json:
        print_json({"tables": [one.as_dict() for one in tables], "notes": notes})
        return
    for one in tables:
        print_table(one.heading, one.rows, title=one.title, right=one.numeric_columns)
        for note in one.notes:
            print_line(note)
    for note in notes:
        print_line(note)
