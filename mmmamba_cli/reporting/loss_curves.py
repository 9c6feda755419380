"""The section on training: a panel per stage with the loss curve of every student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mmmamba_cli.recipe import Stage
from mmmamba_cli.reporting.charts import Line, lines
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, table, tag
from mmmamba_cli.reporting.run_contents import TrainedStage
from mmmamba_cli.reporting.series_styles import legend

# More points per curve would enlarge the page without being visible.
MAX_POINTS = 300
MAX_STEP_TICKS = 8
LOSSES = {
    "mixer-mse": "squared error of the mixers' outputs",
    "kl": "KL(teacher, student), nats a token",
    "matrix-orientation": "distance of the mixing matrices",
    "hidden-alignment": "squared error of the layers' outputs",
}


def losses_section(
    trained: Sequence[TrainedStage], series: Mapping[str, int], remark: str | None = None
) -> Markup:
    """Training loss over steps by stage; held-out numbers in the table.

    `remark` is a sentence on the seconds of the table.
    """
    stages = list(dict.fromkeys(one.stage for one in trained))
    panels = [
        _panel(name, [one for one in trained if one.stage == name], series) for name in stages
    ]
    shown = {one.label: series[one.label] for one in trained}
    return section(
        "losses",
        f"Loss of each stage: {', '.join(one.label for one in trained if one.stage == stages[-1])}",
        figure(
            join_markup((legend(shown), tag("div", *panels, class_="panels"))),
            "Lower is better. Losses of different stages are not comparable. "
            + " ".join(_recipe_sentences(trained, stages)),
            join_markup((_numbers(trained), None if remark is None else paragraph(remark))),
        ),
    )


def _recipe_sentences(trained: Sequence[TrainedStage], stages: Sequence[str]) -> list[str]:
    """In which settings the stages of one panel differ, apart from the steps shown."""
    found = []
    for name in stages:
        alike = [one for one in trained if one.stage == name]
        for field in Stage.model_fields:
            values: dict[str, list[str]] = {}
            for one in alike:
                stage = stage_of(one)
                if stage is not None:
                    values.setdefault(_setting(getattr(stage, field)), []).append(one.label)
            if len(values) > 1:
                listed = "; ".join(f"{value} for {_names(who)}" for value, who in values.items())
                found.append(f"In {name} the recipes differ in {field}: {listed}.")
    return found or ["Lines of one panel have the same recipe for their stage."]


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _names(labels: Sequence[str]) -> str:
    return " and ".join(labels)


def stage_of(one: TrainedStage) -> Stage | None:
    """The stage in the product's recipe; None if the recipe has no stage of that name."""
    return next((stage for stage in one.recipe.stages if stage.name == one.stage), None)


def _panel(name: str, trained: Sequence[TrainedStage], series: Mapping[str, int]) -> Markup:
    stage = stage_of(trained[0])
    what = "loss" if stage is None else LOSSES[stage.loss]
    if stage is not None and stage.loss_scale != 1:
        what += f", times {stage.loss_scale:g}"
    drawn = [Line(one.label, series[one.label], downsample(points(one.rows))) for one in trained]
    drawn = [line for line in drawn if any(math.isfinite(y) for _, y in line.points)]
    if not drawn:
        return tag("div", tag("h3", name), tag("p", "No finite loss was written down."))
    return tag(
        "div",
        tag("h3", name),
        tag("p", what, class_="axis"),
        lines(
            f"{name}: {what}", drawn, x_name="step", y_name=what, log_y=True, x_ticks=_ticks(drawn)
        ),
    )


def _ticks(drawn: Sequence[Line]) -> list[float] | None:
    """Every step where there are few: the axis would have fractions of steps."""
    steps = sorted({x for line in drawn for x, _ in line.points})
    return steps if len(steps) <= MAX_STEP_TICKS else None


def points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(step, loss); a loss that is not a number becomes NaN, a gap in the curve."""
    return [(float(row["step"]), _number(row["loss"])) for row in rows]


def downsample(
    curve: Sequence[tuple[float, float]], most: int = MAX_POINTS
) -> tuple[tuple[float, float], ...]:
    """Reduce a curve to at most `most` points by averaging neighbours in both coordinates.

    A mean leaves out values that are not finite, and is NaN if there are no others.
    """
    if len(curve) <= most:
        return tuple(curve)
    edges = [round(i * len(curve) / most) for i in range(most + 1)]
    parts = [curve[a:b] for a, b in pairwise(edges)]
    return tuple(_mean(part) for part in parts)


def _mean(part: Sequence[tuple[float, float]]) -> tuple[float, float]:
    known = [point for point in part if math.isfinite(point[1])]
    x = sum(x for x, _ in known or part) / len(known or part)
    return x, sum(y for _, y in known) / len(known) if known else math.nan


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _numbers(trained: Sequence[TrainedStage]) -> Markup:
    rows = []
    for one in trained:
        stage, metrics = stage_of(one), one.product.metrics
        held_out = metrics.get("held_out") or {}
        curve = points(one.rows)
        rows.append(
            (
                f"{one.label}, {one.stage}",
                f"{len(one.rows):,}",
                None if stage is None else f"{stage.batch_size:,}",
                None if stage is None else f"{stage.lr:g}",
                _formatted(metrics.get("tokens"), "{:,.0f}"),
                f"{curve[0][1]:.4g}",
                f"{curve[-1][1]:.4g}",
                _formatted(held_out.get("loss"), "{:.4g}"),
                _formatted(held_out.get("agreement"), "{:.1%}"),
                _formatted(metrics.get("seconds"), "{:,.0f}"),
            )
        )
    heading = (
        "product, stage",
        "steps",
        "batch",
        "peak rate",
        "tokens",
        "first loss",
        "last loss",
        "held-out loss",
        "same next token as the teacher, held out",
        "seconds",
    )
    return table("What each stage was given and came to", heading, rows)


def _formatted(value: Any, form: str) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return form.format(value)
