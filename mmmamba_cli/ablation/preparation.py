"""Before the first cell: folders and their locks, and the data that the cells need."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmmamba_cli.ablation.cell_record import RESULTS
from mmmamba_cli.ablation.cells import Cell, is_corpus_spec
from mmmamba_cli.ablation.plan import WORK, Plan, SuiteUse
from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.evaluate.library import find_suite, find_table


def resolve_folders(plan: Plan, out: Path | None, work: Path | None) -> tuple[Path, Path]:
    """The folders of results and of work: those given, else the plan's, else the defaults."""
    results = out or (Path(plan.out) if plan.out is not None else RESULTS / plan.name)
    return results, work or Path("runs") / "ablations" / plan.name


def preparations(plan: Plan, cells: Sequence[Cell], work: Path) -> list[tuple[Path, str]]:
    """Path and command of the data that the cells need and that are not there yet."""
    used = {use.data for cell in cells for use in cell.suites}
    for cell in cells:
        if cell.recipe is not None:
            data = cell.recipe.data
            used |= {data.train, data.held_out, data.image_root}
    paths = [Path(source) for source in used if source is not None and not is_corpus_spec(source)]
    found = [(Path(one.path.replace(WORK, str(work))), one.command) for one in plan.prepare]
    return [
        (made, command)
        for made, command in found
        if not made.exists() and any(path == made or made in path.parents for path in paths)
    ]


def check_suites(suites: Sequence[SuiteUse], say: Callable[[str], None]) -> None:
    """Find the table of every suite, or make it, before the first cell needs it.

    Raises `DataError` for an unknown suite or rule, or a table that is not there.
    """
    for use in suites:
        suite = find_suite(use.name)
        suite.scoring(use.rule)
        find_table(suite, None if use.data is None else Path(use.data), say)


def check_data(cells: Sequence[Cell]) -> None:
    """Raise `DataError` if a file of training data does not exist: every cell would fail."""
    sources = [
        source
        for cell in cells
        if cell.recipe is not None and cell.stages
        for source in (cell.recipe.data.train, cell.recipe.data.held_out)
        if source is not None and not is_corpus_spec(source) and "{" not in source
    ]
    for source in dict.fromkeys(sources):
        if not Path(source).exists():
            raise DataError(
                f"the plan's data {source} does not exist",
                "create the file, or give another one with --set data.train=FILE",
            )


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other runners; it is made if it is not there.

    Raises `RunError` if it is locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The folder itself is locked, so that no file of the lock lies among results.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RunError(
            f"{folder} is in use by another mmmamba ablate",
            "wait for it, or choose another --out and --work",
        ) from error
    try:
        yield
    finally:
        os.close(handle)
