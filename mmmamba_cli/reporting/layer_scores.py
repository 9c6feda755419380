"""Layers chosen by measurement: bars of their scores, in a report and as a picture of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from mmmamba_cli.errors import RunError
from mmmamba_cli.layer_selection.layer_scores import (
    MIN_SPEARMAN,
    LayerScore,
    LayerScores,
    file_digest,
    half_agreement,
    read_layer_scores,
)
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.html import Markup, figure, paragraph, section, table, tag
from mmmamba_cli.reporting.run_contents import ReportData, RunContents
from mmmamba_cli.reporting.svg_file import write_svg
from mmmamba_cli.runs import Manifest

CHOSEN, OTHER = 0, 1


def layer_score_sections(report: ReportData, left_out: dict[str, str]) -> dict[str, Markup]:
    """A section for each hybrid whose layers were measured; adds to `left_out`."""
    parts: dict[str, Markup] = {}
    for run in report.runs:
        for name, product in run.products.items():
            # A product of a later stage has no record of its own.
            if not product.selection:
                continue
            title = f"attention layers, {run.label(name)}"
            try:
                scores = _scores_of(run, product)
            except RunError as error:
                left_out[title] = error.message
            else:
                parts[title] = _section(run.label(name), product, scores)
    return parts


def _scores_of(run: RunContents, product: Manifest) -> LayerScores:
    """The scores that a product's layers were chosen by. Raises `RunError` if they are gone."""
    named = str(product.selection.get("scores"))
    file = run.folder / named
    if Path(named).is_absolute() or ".." in Path(named).parts or not file.is_file():
        raise RunError(f"the scores of its layers, {Path(named).name}, are not in the run")
    if file_digest(file) != product.selection.get("scores_sha256"):
        raise RunError(f"{Path(named).name} was changed since the layers were chosen by it")
    return read_layer_scores(file)


def _section(label: str, product: Manifest, scores: LayerScores) -> Markup:
    """Bars of the first round, in which all layers were scored, and the numbers."""
    layers = scores.round_of(()).layers
    agreement = half_agreement(layers).spearman
    sentences = [
        f"{len(product.attention_layers)} of {product.num_layers} layers have the teacher's "
        f"attention, chosen by {scores.method}: {scores.unit}. Whiskers are one standard error "
        "over samples."
    ]
    if product.selection.get("greedy"):
        sentences.append("Layers were scored again after each choice; shown is the first round.")
    if agreement is not None:
        sentences.append(f"Both halves of the data rank the layers with Spearman {agreement:.2f}.")
        if agreement < MIN_SPEARMAN:
            sentences.append("That is low: the choice depends much on the samples.")
    stacks = dict.fromkeys(one.stack for one in layers)
    panels = [
        tag(
            "div",
            tag("h3", f"{stack} stack"),
            score_bars(
                f"{label}, {stack} stack",
                [one for one in layers if one.stack == stack],
                product.attention_layers,
            ),
        )
        for stack in stacks
    ]
    return section(
        f"layers-{product.name}",
        f"Attention layers of {label}",
        paragraph(" ".join(sentences)),
        figure(
            tag("div", *panels, class_="panels"),
            "The higher, the more a layer needs attention.",
            _numbers(layers, product.attention_layers),
        ),
    )


def score_bars(title: str, layers: Iterable[LayerScore], chosen: Collection[int]) -> Markup:
    """A bar for each layer, in the order of layers; chosen ones are marked in their label."""
    rows = [
        Bar(
            f"layer {one.layer}" + (", attention" if one.layer in chosen else ""),
            one.score,
            CHOSEN if one.layer in chosen else OTHER,
            (max(0.0, one.score - one.error), one.score + one.error) if one.score > 0 else None,
        )
        for one in sorted(layers, key=lambda one: one.layer)
    ]
    return bars(title, rows)


def _numbers(layers: Sequence[LayerScore], chosen: Collection[int]) -> Markup:
    rows = [
        (
            str(one.layer),
            one.stack,
            f"{one.score:.4g}",
            f"{one.error:.2g}",
            f"{one.halves[0]:.4g}",
            f"{one.halves[1]:.4g}",
            "yes" if one.layer in chosen else "",
        )
        for one in sorted(layers, key=lambda one: (-one.score, one.layer))
    ]
    heading = ("layer", "stack", "score", "standard error", "half 1", "half 2", "attention")
    return table("Layers by score", heading, rows)


def write_score_picture(
    file: Path, title: str, layers: Iterable[LayerScore], chosen: Collection[int]
) -> None:
    """Write the bars of all layers as an SVG file of its own, in the colours of a light page."""
    write_svg(file, score_bars(title, layers, chosen))
