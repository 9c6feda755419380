"""Sections on provenance: lineage, commands, versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import PurePath

from mmmamba_cli.checkpoint import public_model_name
from mmmamba_cli.reporting.html import Markup, join_markup, paragraph, section, table, tag
from mmmamba_cli.reporting.run_contents import ReportData, RunContents
from mmmamba_cli.runs import Manifest
from mmmamba_cli.runs.provenance import redact_command, redact_path, redact_recipe

HASH_DIGITS = 12


def lineage_section(report: ReportData) -> Markup:
    """Lineage of each run as a nested list, and its products as a table."""
    parts: list[Markup] = []
    for run in report.runs:
        title = "This run" if run.name is None else f"Compared with: {run.name}"
        parts += [tag("h3", title), _tree(run), _products(run), *_recipes(run)]
    return section("lineage", "What came from what, by content hash", *parts)


def _tree(run: RunContents) -> Markup:
    above: dict[str, list[Manifest]] = {}
    for product in run.products.values():
        parent = product.derived_from
        known = parent is not None and parent.name in run.products
        above.setdefault(parent.name if parent and known else "", []).append(product)

    def branch(name: str) -> Markup | None:
        grown = [
            tag("li", _node(product, run), branch(product.name))
            for product in above.get(name, [])
            if product.name != name
        ]
        return tag("ul", *grown) if grown else None

    return tag("ul", tag("li", _teacher(run), branch("")), class_="tree")


def _teacher(run: RunContents) -> Markup:
    if run.teacher is None:
        return tag("span", "no teacher: the student was imported", class_="node")
    return tag(
        "span",
        tag("strong", "teacher "),
        f"{teacher_name(run.teacher.path)} ",
        tag("code", run.teacher.content_hash[:HASH_DIGITS]),
        class_="node",
    )


def _node(product: Manifest, run: RunContents) -> Markup:
    how = [f"by {product.made_by}", product.kind]
    if product.name == run.current:
        how.append("current")
    return tag(
        "span",
        tag("strong", f"{run.label(product.name)} "),
        f"{', '.join(how)} ",
        tag("code", product.content_hash[:HASH_DIGITS]),
        class_="node",
    )


def teacher_name(path: str) -> str:
    """The public name of a teacher, or its folder's name, without its location on this machine."""
    return public_model_name(path) or PurePath(redact_path(path)).name or path


def _products(run: RunContents) -> Markup:
    rows = []
    for product in run.products.values():
        recipe = run.recipes.get(product.name)
        rows.append(
            (
                product.name,
                ", ".join(map(str, product.attention_layers)) or "none",
                ", ".join(product.stages) or ("not known" if product.final is None else "none"),
                "not known" if product.final is None else "yes" if product.final else "no",
                f"{product.parameters:,}",
                product.dtype,
                None if recipe is None else recipe.mixer.init,
                None if recipe is None else str(recipe.seed),
                product.created[:19].replace("T", " "),
            )
        )
    heading = (
        "product",
        "attention layers",
        "stages done",
        "distilled end to end",
        "parameters",
        "dtype",
        "mixer begins as",
        "seed",
        "made (UTC)",
    )
    return table("Products", heading, rows, words=True)


def _recipes(run: RunContents) -> Iterator[Markup]:
    """The recipes of products from which no other product was made."""
    parents = {p.name for product in run.products.values() for p in product.parents}
    for product in run.products.values():
        if product.name not in parents:
            summary = tag("summary", f"Recipe of {run.label(product.name)}")
            yield tag(
                "details",
                summary,
                tag("pre", tag("code", redact_recipe(product.recipe)), tabindex=0),
            )


def side_by_side(report: ReportData) -> str | None:
    """A sentence on runs that were made at the same time; None if there are none."""
    spans = []
    for run in report.runs:
        times = sorted(_moment(product.created) for product in run.products.values())
        spans.append((run.title, times[0], times[-1]))
    beside = [
        name
        for i, (name, begin, end) in enumerate(spans)
        if any(begin <= other[2] and other[1] <= end for other in spans[:i] + spans[i + 1 :])
    ]
    if not beside:
        return None
    return (
        f"The runs {' and '.join(beside)} were made at the same time, side by side, so their "
        "seconds are not those of a run alone."
    )


def commands_section(report: ReportData) -> Markup:
    """Every command behind the page, in chronological order for each run."""
    parts: list[Markup] = []
    seen: set[str] = set()
    for run in report.runs:
        found = {text: when for when, text in _commands(run) if text not in seen}
        seen |= set(found)
        if report.runs[1:] and found:
            parts.append(tag("h3", run.title))
        parts += _listed(found)
    compared = {one.command: _moment(one.created) for one in report.comparisons}
    compared = {redact_command(text): when for text, when in compared.items() if text not in seen}
    parts += [tag("h3", "Comparisons"), *_listed(compared)] if compared else []
    return section(
        "commands",
        "The commands that repeat each part",
        paragraph(
            "The commands of a run are in the order in which they ran. Of an absolute path only "
            f"the last part is shown. {side_by_side(report) or ''}".strip()
        ),
        *parts,
    )


def _listed(commands: Mapping[str, str]) -> list[Markup]:
    """Commands by time in one block; empty without commands."""
    if not commands:
        return []
    ordered: list[str] = sorted(commands, key=lambda one: commands[one])
    return [tag("pre", tag("code", join_markup(ordered, by="\n")), tabindex=0)]


def _commands(run: RunContents) -> Iterator[tuple[str, str]]:
    """(time, command); a command with several results is listed once, at its first."""
    commands = [(product.created, product.command) for product in run.products.values()]
    commands += [
        (one.finished, one.command) for one in run.evaluated if one.finished and one.command
    ]
    if run.profile is not None:
        commands.append((run.profile.created, run.profile.command))
    seen: dict[str, str] = {}
    for when, command in commands:
        seen[command] = min(_moment(when), seen.get(command, _moment(when)))
    for command, when in seen.items():
        yield when, redact_command(command)


def _moment(text: str) -> str:
    """A sortable form of a time, independent of how its zone is written."""
    try:
        return datetime.fromisoformat(text).isoformat()
    except ValueError:
        return text


def versions_section(report: ReportData, created: str) -> Markup:
    """Versions, devices, seeds and dates; parts that agree share a row."""
    columns: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for what, found in _versions(report):
        columns.setdefault(tuple(sorted(found.items())), []).append(what)
    rows = [
        (", ".join(whats), ", ".join(f"{name} {value}" for name, value in found))
        for found, whats in columns.items()
    ]
    return section(
        "versions",
        "Versions, devices and dates",
        table("What ran with what", ("part", "versions and settings"), rows, words=True),
        paragraph(f"This page was written {created} UTC, from files only: no model was asked."),
    )


def _versions(report: ReportData) -> Iterator[tuple[str, dict[str, str]]]:
    for run in report.runs:
        for product in run.products.values():
            yield f"making {run.label(product.name)}", dict(product.versions)
        for one in run.evaluated:
            settings = {k: str(one.result.settings.get(k)) for k in ("device", "dtype")}
            seed = {"seed of intervals": str(one.result.seed)}
            label = f"asking {one.label} {one.result.suite}"
            yield label, {**one.result.versions, **settings, **seed}
        if run.profile is not None:
            device = {"device": run.profile.device.name, "dtype": run.profile.dtype}
            yield "profile", {**run.profile.versions, **device, "seed": str(run.profile.seed)}
