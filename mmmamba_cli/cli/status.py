"""`mmmamba status`: the products of a run and their lineage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmmamba_cli.cli.console import UNLIMITED_COLUMNS, out, print_json, print_warning
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text
    from rich.tree import Tree

    from mmmamba_cli.inspection import Lineage, ProductSummary, SuiteScore
    from mmmamba_cli.inspection.text_plots import Marks


def command(run: RunFolder = DEFAULT_RUN, as_json: AsJson = False) -> None:
    """Draw the run's lineage: teacher, products, the current one."""
    from mmmamba_cli.checkpoint.atomic_writes import restore_hint
    from mmmamba_cli.inspection import read_lineage
    from mmmamba_cli.runs import Run

    lineage = read_lineage(Run(run))
    for name, hidden in Run(run).interrupted_products().items():
        print_warning(f"product {name!r} was being replaced and is kept as {hidden}")
        print_warning(restore_hint(hidden))
    if as_json:
        print_json(_record(lineage))
        return
    _print(lineage)
    for sentence in lineage.left_out:
        print_warning(f"{sentence}: not shown")


def _record(lineage: Lineage) -> dict[str, Any]:
    teacher = lineage.teacher
    return {
        "run": str(lineage.folder),
        "teacher": teacher and teacher.model_dump(exclude={"digests"}),
        "teacher_scores": [vars(score) for score in lineage.teacher_scores],
        "current": lineage.current,
        "left_out": list(lineage.left_out),
        "products": [
            {
                **product.manifest.model_dump(mode="json"),
                "bytes": product.nbytes,
                "held_out": list(product.held_out),
                "scores": [vars(score) for score in product.scores],
            }
            for product in lineage.products.values()
        ],
    }


def _print(lineage: Lineage) -> None:
    from rich.console import Console

    console = out()
    if not console.is_terminal:
        console = Console(width=UNLIMITED_COLUMNS)
    console.print(_draw(lineage, console.encoding))


def _draw(lineage: Lineage, encoding: str) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    from mmmamba_cli.inspection import legend, marks_for

    marks = marks_for(encoding)
    teacher = "none" if lineage.teacher is None else lineage.teacher.path
    label = Text.assemble("teacher ", (teacher, "bold"), *_lines(_scored(lineage.teacher_scores)))
    label.append(f"\n{legend(marks)}", style="dim")
    root = Tree(label)
    branches: dict[str, Tree] = {}
    for name, product in lineage.products.items():
        parent = branches.get(product.parent_name or "", root)
        branches[name] = parent.add(_label(product, name == lineage.current, marks))
    return root


def _label(product: ProductSummary, is_current: bool, marks: Marks) -> Text:
    from rich.text import Text

    from mmmamba_cli.inspection import format_bytes, layer_plan

    manifest = product.manifest
    plan = layer_plan(
        manifest.num_layers, set(manifest.attention_layers), marks, product.embedding_layers
    )
    stages = ", ".join(manifest.stages)
    if not stages and manifest.final is not None:
        stages = "no stage done"
    lines = [
        plan,
        f"{manifest.kind}, {manifest.parameters / 1e6:,.1f} M, {manifest.dtype}, "
        f"{format_bytes(product.nbytes)}, {manifest.content_hash[:12]}",
        "; ".join(part for part in (stages, manifest.progress) if part),
    ]
    lines += _held_out(product.held_out, marks)
    return Text.assemble(
        (manifest.name, "bold"),
        ("  <- current" if is_current else "", "green"),
        *_lines(lines),
        *_lines(_scored(product.scores)),
    )


def _held_out(losses: Sequence[float], marks: Marks) -> list[str]:
    """A line with a sparkline of the held-out losses; a single loss has none."""
    from mmmamba_cli.inspection import sparkline

    if not losses:
        return []
    first, last = f"{losses[0]:.4g}", f"{losses[-1]:.4g}"
    return [
        f"held out {sparkline(losses, marks)} {first} to {last}"
        if len(losses) > 1
        else f"held out {first}"
    ]


def _lines(texts: Sequence[str]) -> list[str]:
    return [f"\n{text}" for text in texts]


def _scored(scores: Sequence[SuiteScore]) -> list[str]:
    """A line for each suite with the headline score of each rule."""
    by_suite: dict[str, list[str]] = {}
    for score in scores:
        text = (
            f"{score.metric} {score.value:,.1f} ({score.rule}{', part' if score.partial else ''})"
        )
        by_suite.setdefault(score.suite, []).append(text)
    return [f"{suite}: {', '.join(texts)}" for suite, texts in by_suite.items()]
