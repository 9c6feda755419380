"""Where a plan stands: finished cells, and the cells and shared stages to run, parents first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmmamba_cli.ablation.cell_record import (
    CellRecord,
    finished_records,
    missing_suites,
    read_records,
)
from mmmamba_cli.ablation.cells import Cell, SharedStages, find_shared_stages
from mmmamba_cli.ablation.estimates import Estimator
from mmmamba_cli.ablation.plan import SuiteUse
from mmmamba_cli.ablation.run_folders import has_product
from mmmamba_cli.errors import RunError, name_some

Unit = Cell | SharedStages


@dataclass(frozen=True)
class PlanProgress:
    """Where a plan stands: records by cell, cells to run, and of all cells the shared
    stages and run folders.

    `lacking` has the labels of suites that the plan has gained since a cell was finished, of the
    selected cells whose product is gone, so that they cannot be evaluated on them.
    """

    records: Mapping[str, CellRecord]
    pending: tuple[Cell, ...]
    shared_stages: Mapping[str, Sequence[SharedStages]]
    folders: Mapping[str, str]
    lacking: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def suites(self) -> list[SuiteUse]:
        """The suites that the pending cells will be evaluated on."""
        done = finished_records(self.records)
        uses = (
            use
            for cell in self.pending
            for use in (missing_suites(cell, done[cell.name]) if cell.name in done else cell.suites)
        )
        return list(dict.fromkeys(uses))

    @property
    def pending_shared_stages(self) -> dict[str, Sequence[SharedStages]]:
        """The shared stages of the cells to train; a finished cell that lacks suites needs none."""
        done = finished_records(self.records)
        return {
            cell.name: self.shared_stages.get(cell.name, ())
            for cell in self.pending
            if cell.name not in done
        }


def find_progress(
    out: Path,
    work: Path,
    cells: Sequence[Cell],
    selected: Sequence[Cell],
    *,
    retry: bool,
    overwrite: bool,
) -> PlanProgress:
    """Read the results and list the selected cells that have none, or lack suites.

    A cell that lacks suites is run if its product is still there. `retry` runs failed cells again,
    `overwrite` those whose results were made with other settings.

    Raises:
        RunError: results were made with other settings, without `overwrite`.
    """
    records, outdated = read_records(out, cells)
    named = [cell.name for cell in outdated if cell in selected]
    if named and not overwrite:
        raise RunError(
            f"{out} has results of this plan with other settings: {name_some(named)}",
            "--overwrite runs these cells again; or choose another --out",
        )
    done = finished_records(records) if retry else records
    pending, lacking = [], {}
    for cell in selected:
        record = done.get(cell.name)
        if record is None:
            pending.append(cell)
        elif record.status == "finished" and (missing := missing_suites(cell, record)):
            if _model_is_left(cell, record, work):
                pending.append(cell)
            else:
                lacking[cell.name] = tuple(use.title for use in missing)
    folders = {cell.name: cell.folder for cell in cells}
    return PlanProgress(records, tuple(pending), find_shared_stages(cells), folders, lacking)


def _model_is_left(cell: Cell, record: CellRecord, work: Path) -> bool:
    """Whether the evaluated model of a finished cell is still there."""
    if cell.recipe is None:
        return True
    model = record.model
    return model is not None and has_product(work / cell.folder, model.product, model.content_hash)


def units_to_run(progress: PlanProgress) -> list[tuple[Unit, SharedStages | None]]:
    """The units of the pending cells, parents first, with the shared stages each starts from."""
    found: dict[str, tuple[Unit, SharedStages | None]] = {}
    pending = progress.pending_shared_stages
    for cell in progress.pending:
        path = pending.get(cell.name, ())
        for shared in path:
            found.setdefault(shared.folder, (shared, shared.parent))
        found[cell.folder] = (cell, path[-1] if path else None)
    return list(found.values())


def estimates(progress: PlanProgress, estimator: Estimator) -> list[tuple[Unit, float | None]]:
    """Seconds of each unit to run."""
    found = [
        (unit, estimator.estimate(unit, parent.stages if parent else ()))
        for unit, parent in units_to_run(progress)
    ]
    return [(unit, None if estimate is None else estimate.seconds) for unit, estimate in found]
