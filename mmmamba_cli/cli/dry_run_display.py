"""What `distill --dry-run` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mmmamba_cli.cli.console import (
    approximate_time,
    escape_control,
    print_line,
    print_table,
    print_text,
)

if TYPE_CHECKING:
    from mmmamba_cli.data import RowText
    from mmmamba_cli.distill import DryRun, StageForecast

# Rows of a batch that are printed; --json has all of the first micro batch.
MAX_ROWS = 3
# Characters of a piece of text from either end, before its middle is left out.
MAX_PIECE = 300
SECONDS_PER_HOUR = 3600
DAY_HOURS = 48


def print_dry_run(report: DryRun) -> None:
    """Print a report: what learns, memory, time and disk, and the first batch as text."""
    where = f" with {report.processes} processes" if report.processes > 1 else ""
    print_line(
        f"starts from {report.start.name} ({report.start.kind}), on {report.device}{where}; "
        "nothing is trained, nothing is written"
    )
    for note in report.notes:
        print_line(note)
    print_text()
    _print_learning(report)
    _print_memory(report)
    _print_time_and_disk(report)
    for stage in _stages_of_other_data(report.stages):
        _print_batch(stage)
    _print_verdict(report)


def _print_learning(report: DryRun) -> None:
    names = list(dict.fromkeys(one.name for stage in report.stages for one in stage.learns))
    sizes = [{one.name: f"{one.elements:,}" for one in stage.learns} for stage in report.stages]
    rows = [[name, *(found.get(name) for found in sizes)] for name in names]
    totals = [f"{sum(one.elements for one in stage.learns):,}" for stage in report.stages]
    tensors = [f"{sum(one.tensors for one in stage.learns):,}" for stage in report.stages]
    plans = [str(len(stage.attention_layers)) for stage in report.stages]
    rows += [["total", *totals], ["tensors", *tensors], ["attention layers", *plans]]
    _print_columns("learns, parameters", report, rows)


def _print_memory(report: DryRun) -> None:
    from mmmamba_cli.inspection import format_bytes

    rows: list[list[str | None]] = []
    for part in ("frozen_weights", "master_weights", "gradients", "moments", "activations"):
        values = (getattr(stage.memory, part) for stage in report.stages)
        rows.append([part.replace("_", " "), *map(format_bytes, values)])
    rows.append(["total", *(format_bytes(stage.memory.total) for stage in report.stages)])
    most = (
        f"{format_bytes(stage.memory_at_most.total)} ({stage.max_length:,})"
        for stage in report.stages
    )
    rows.append(["total, rows of max_length", *most])
    _print_columns("memory, one process", report, rows)


def _print_time_and_disk(report: DryRun) -> None:
    from mmmamba_cli.inspection import format_bytes

    def each(show: Callable[[StageForecast], str | None]) -> list[str | None]:
        return [show(stage) for stage in report.stages]

    rows = [
        ["steps", *each(lambda one: f"{one.stage.steps:,}")],
        ["samples a step", *each(lambda one: f"{one.stage.batch_size:,}")],
        ["micro batches, first step", *each(lambda one: f"{one.batch.micro_batches:,}")],
        ["tokens, all steps", *each(lambda one: f"{one.tokens:,}")],
        ["tokens a second", *each(_rate)],
        ["time", *each(lambda one: _duration(one.seconds))],
        ["product", *each(lambda one: format_bytes(one.disk.product))],
        ["best student, at most", *each(lambda one: format_bytes(one.disk.best))],
        ["training states", *each(lambda one: format_bytes(one.disk.states))],
    ]
    _print_columns("time and disk", report, rows)
    sources = dict.fromkeys(stage.rate.source for stage in report.stages if stage.rate is not None)
    if sources:
        print_line(f"tokens a second: {'; '.join(sources)}")
    print_text()


def _print_columns(title: str, report: DryRun, rows: Sequence[Sequence[str | None]]) -> None:
    names = [stage.stage.name for stage in report.stages]
    print_table((title, *names), rows, right=names)
    print_text()


def _stages_of_other_data(stages: Sequence[StageForecast]) -> list[StageForecast]:
    """The stages whose first batch differs from those before."""
    found: list[StageForecast] = []
    for stage in stages:
        # Micro batches of other sizes may begin with the same row.
        if all(stage.batch.rows[0] != other.batch.rows[0] for other in found):
            found.append(stage)
    return found


def _print_batch(stage: StageForecast) -> None:
    batch, size = stage.batch, stage.batch.largest
    print_line(
        f"first batch of {stage.stage.name}: {batch.samples} conversations, {batch.tokens:,} "
        f"tokens, {batch.answer_tokens:,} of answers (⟦...⟧); rows {batch.batching}, largest micro "
        f"batch {size.rows} x {size.columns:,}"
    )
    for row in batch.rows[:MAX_ROWS]:
        text = escape_control(_shortened(row).marked()).rstrip("\n")
        print_text(f"  {text}".replace("\n", "\n  "))
    left = len(batch.rows) - MAX_ROWS
    if left > 0:
        print_line(f"  and {left:,} more rows of this micro batch; --json has them")
    for sample in batch.bad[:MAX_ROWS]:
        print_line(f"  cannot be read: {sample}")
    if len(batch.bad) > MAX_ROWS:
        print_line(f"  and {len(batch.bad) - MAX_ROWS:,} more that cannot be read")
    print_text()


def _shortened(row: RowText) -> RowText:
    """The row without the middle of long pieces."""

    def cut(text: str) -> str:
        if len(text) <= 2 * MAX_PIECE + 5:
            return text
        return f"{text[:MAX_PIECE]} ... {text[-MAX_PIECE:]}"

    return replace(row, runs=tuple(replace(run, text=cut(run.text)) for run in row.runs))


def _print_verdict(report: DryRun) -> None:
    from mmmamba_cli.distill import HOW_COMPUTED
    from mmmamba_cli.inspection import format_bytes

    most = format_bytes(report.peak_memory_at_most)
    print_line(
        f"memory: {_fit(report.peak_memory, report.free_memory)}; {most} if every row of a micro "
        "batch has max_length"
    )
    if report.free_memory is not None and report.peak_memory > report.free_memory:
        print_line("  more parts of a batch need less: --set stages.NAME.accumulation=N")
    print_line(f"disk: {_fit(report.disk, report.free_disk)}, products included")
    unknown = ", ".join(one.stage.name for one in report.stages if one.rate is None)
    if unknown:
        print_line(
            f"time: unknown for {unknown}, of which nothing has been measured; --measure times a "
            "step of each stage whose models exist"
        )
    else:
        print_line(f"time: {_duration(report.seconds)}, without evaluations and saves")
    for line in HOW_COMPUTED:
        print_line(line)


def _fit(needed: int, free: int | None) -> str:
    from mmmamba_cli.inspection import format_bytes

    if free is None:
        return f"{format_bytes(needed)}; what is free is unknown"
    verdict = "fits" if needed <= free else "does not fit"
    return f"{verdict}: {format_bytes(needed)} of {format_bytes(free)} free"


def _rate(stage: StageForecast) -> str | None:
    return None if stage.rate is None else f"{stage.rate.tokens_per_second:,.0f}"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return "unknown"
    hours = seconds / SECONDS_PER_HOUR
    if hours < 1:
        return approximate_time(seconds)
    return f"about {hours:.1f} hours" if hours < DAY_HOURS else f"about {hours / 24:.1f} days"
