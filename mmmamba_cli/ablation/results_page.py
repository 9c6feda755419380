"""The page of results: the tables of several plans as Markdown, from the JSON of their cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.ablation.cell_record import CellRecord, finished_records, read_records
from mmmamba_cli.ablation.cells import Cell, expand
from mmmamba_cli.ablation.plan import Plan, load_plan
from mmmamba_cli.ablation.preparation import resolve_folders
from mmmamba_cli.ablation.tables import TextTable, plan_tables

LEGEND = """\
## How to read the tables

- **Arm**: one way to make a student. The arms of a plan differ in one setting each.
- **Cell**: one arm with one seed, a training and its evaluation.
- **Score**: percent of right answers, a mean over the suite's categories and over seeds, ± half the
  95 % t interval over seeds.
- **Above** an arm: the difference to its score in points, with a 95 % bootstrap interval from
  10,000 replicates. Each replicate draws the same seeds and pictures (or other units of the suite)
  for both arms. *Not separated*: the interval contains 0, so the data do not tell the arms apart.
- **% of the teacher**: score / teacher's score. **Above chance**: (score - chance) / (teacher -
  chance) in percent, where chance is the score of random guesses.
- **Mark**: a score that the plan asks for.
- **Loss**: that of the arm's last stage on held-out data. Different stages have different losses.
- **Same token**: held-out tokens of pictures, questions and answers at which student and teacher
  have the same most likely next token.
- **Nats per answer token**: negative log-likelihood of the correct answers.

With one seed an interval covers the choice of pictures only, and another training of the same arm
may differ by more: a difference of one seed is a hint and not a result."""
MARKS = "marks"
SAY = "what the tables say"


@dataclass(frozen=True)
class Conclusions:
    """What the tables of a plan say, by the name of the table or `marks`.

    `cells` is the number of finished cells that the texts were written from.
    """

    cells: int
    texts: Mapping[str, str]


def results_page(
    files: Sequence[Path], root: Path, head: str, conclusions: Mapping[str, Conclusions]
) -> str:
    """The page of the plans in `files`; `root` is the folder that their results count from.

    `conclusions` has those of a plan under its name; a plan may lack them.
    """
    parts = [head, LEGEND]
    for file in files:
        plan = load_plan(file)
        place = file.relative_to(root).as_posix()
        parts += _plan_section(plan, place, root, conclusions.get(plan.name))
    return "\n\n".join(parts) + "\n"


def _plan_section(
    plan: Plan, file: str, root: Path, conclusions: Conclusions | None
) -> Iterator[str]:
    out, _ = resolve_folders(plan, None, None)
    cells = expand(plan)
    records, _ = read_records(root / out, cells)
    tables, notes = plan_tables(plan, root / out, cells)
    yield f"## {plan.name}"
    if plan.description:
        yield plan.description
    yield provenance(cells, finished_records(records), file, out)
    by_name = _by_name(plan, tables)
    for name, group in by_name.items():
        for table in group:
            yield f"### {table.title}"
            yield markdown(table)
            yield from table.notes
        if conclusions is not None and name in conclusions.texts:
            yield f"### {group[0].title.partition(': ')[0]}: {SAY}"
            yield conclusions.texts[name]
            if conclusions.cells != len(finished_records(records)):
                yield f"Written when {conclusions.cells} cells were finished."
    for note in notes:
        yield f"{note[0].upper()}{note[1:]}."


def _by_name(plan: Plan, tables: Sequence[TextTable]) -> dict[str, list[TextTable]]:
    """The tables of the page by the name of the plan's table; that of the marks by `marks`."""
    titles = {f"{one.title or one.name}: ": one.name for one in plan.all_tables}
    found: dict[str, list[TextTable]] = {}
    for table in tables:
        names = (name for start, name in titles.items() if table.title.startswith(start))
        found.setdefault(next(names, MARKS), []).append(table)
    return found


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
