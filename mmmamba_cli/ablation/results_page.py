"""The page of results: the tables of several plans as Markdown, from the JSON of their cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmmamba_cli.ablation.cell_record import CellRecord, finished, read_records
from mmmamba_cli.ablation.cells import Cell, expand
from mmmamba_cli.ablation.plan import Plan, load_plan
from mmmamba_cli.ablation.preparation import resolve_folders
from mmmamba_cli.ablation.tables import TextTable, plan_tables

LEGEND = """\
Scores are means over seeds, ± half the 95 % t interval. *Above* is the difference to the named arm
with its 95 % bootstrap interval over 10,000 replicates. A replicate draws the same seeds and
pictures (or other units of the suite) for both arms. *Not separated*: the interval contains 0.
*Above chance* is (score - chance) / (teacher - chance) in percent."""


def results_page(files: Sequence[Path], root: Path, head: str) -> str:
    """The page of the plans in `files`; `root` is the folder that their results count from."""
    parts = [head, LEGEND]
    for file in files:
        plan = load_plan(file)
        parts += _plan_section(plan, file.relative_to(root).as_posix(), root)
    return "\n\n".join(parts) + "\n"


def _plan_section(plan: Plan, file: str, root: Path) -> Iterator[str]:
    out, _ = resolve_folders(plan, None, None)
    cells = expand(plan)
    records, _ = read_records(root / out, cells)
    tables, notes = plan_tables(plan, root / out, cells)
    yield f"## {plan.name}"
    if plan.description:
        yield plan.description
    yield provenance(cells, finished(records), file, out)
    for table in tables:
        yield f"### {table.title}"
        yield markdown(table)
        yield from table.notes
    for note in notes:
        yield f"{note[0].upper()}{note[1:]}."


def provenance(
    cells: Sequence[Cell], records: Mapping[str, CellRecord], file: str, out: Path
) -> str:
    """One paragraph: command, device, dates, versions and where the numbers lie."""
    command = f"`mmmamba ablate {file}`"
    if not records:
        return f"{command}: no cell has been run."
    devices = sorted({one.device for one in records.values()})
    days = sorted({one.timing.date[:10] for one in records.values()})
    span = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    versions = sorted(
        {
            ", ".join(f"{name} {one.versions[name]}" for name in ("torch", "transformers"))
            for one in records.values()
        }
    )
    return (
        f"{command}, {len(records)} of {len(cells)} cells; "
        f"{', '.join(devices)}; {'; '.join(versions)}; {span}: `{out.as_posix()}`."
        + _later_answers(records)
    )


def _later_answers(records: Mapping[str, CellRecord]) -> str:
    """Sentences about suites that were answered after their cells, maybe on another device."""
    found: dict[tuple[str, str, str, str], set[str]] = {}
    for record in records.values():
        for suite in record.suites:
            if suite.later is not None:
                later, names = suite.later, ("torch", "transformers")
                torch, transformers = (later.versions[name] for name in names)
                place = (later.device, torch, transformers, later.date[:10])
                found.setdefault(place, set()).add(suite.label)
    return "".join(
        f" Answered later: {', '.join(sorted(labels))} on {device}; torch {torch}, transformers "
        f"{transformers}; {day}."
        for (device, torch, transformers, day), labels in sorted(found.items())
    )


def markdown(table: TextTable) -> str:
    """A table in Markdown."""
    lines = [_row(table.heading), "|" + "---|" * len(table.heading)]
    lines += [_row(row) for row in table.rows]
    return "\n".join(lines)


def _row(cells: Sequence[object]) -> str:
    texts = ["" if cell is None else str(cell).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(texts)} |"
