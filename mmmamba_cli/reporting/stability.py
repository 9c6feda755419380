"""How long layers remember, and what errors do over the length of a text: a section, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmmamba_cli.reporting.charts import Line, lines
from mmmamba_cli.reporting.html import (
    Child,
    Markup,
    figure,
    item_list,
    join_markup,
    paragraph,
    section,
    table,
    tag,
)
from mmmamba_cli.reporting.run_contents import ReportData
from mmmamba_cli.reporting.series_styles import legend
from mmmamba_cli.reporting.strip_chart import Strip, strips
from mmmamba_cli.reporting.svg_file import write_svg
from mmmamba_cli.runs import TEACHER
from mmmamba_cli.stability import (
    DeviationRecord,
    StabilityRecord,
    find_sentences,
    format_tokens,
    half_life,
)

# Tokens of an entry of `PrecisionRecord.block_kl`.
BLOCK_TOKENS = 64
# Blocks are joined so that a point of a curve has at least this ratio to the one before.
MIN_RATIO = 1.3


def stability_sections(report: ReportData, series: Mapping[str, int]) -> dict[str, Markup]:
    """One section on all models whose stability was measured; none without any."""
    found = {
        TEACHER if name == TEACHER else run.label(name): record
        for run in report.runs
        for name, record in run.stability.items()
    }
    return {"stability": _section(found, series)} if found else {}


def _section(found: Mapping[str, StabilityRecord], series: Mapping[str, int]) -> Markup:
    parts: list[Child] = []
    for label, record in found.items():
        parts += [tag("h3", _heading(label, record)), item_list(find_sentences(record))]
    memory = [
        tag("div", tag("h3", label), half_life_chart(label, record, series[label]))
        for label, record in found.items()
        if has_decays(record)
    ]
    if memory:
        caption = (
            "Half-life of an error in the state of each head, a dot a head; hollow: where training "
            "started."
        )
        parts.append(figure(tag("div", *memory, class_="panels"), caption, _memory_table(found)))
    curves = {label: record for label, record in found.items() if record.precision is not None}
    if curves:
        shown = legend({label: series[label] for label in curves})
        parts.append(
            figure(
                join_markup((shown, precision_chart(curves, series))),
                "Divergence of the logits of the narrower dtype from those of fp32 at the same "
                "tokens. Lower is better; a rising line is an error that grows with the text.",
                _precision_table(curves),
            )
        )
    panels = [
        tag(
            "div",
            tag("h3", f"{label}: {_disturbance(one)}"),
            legend(_legend(deviation_lines(one))),
            deviation_chart(label, one),
        )
        for label, record in found.items()
        for one in record.deviations
        if has_points(one)
    ]
    if panels:
        parts.append(
            figure(
                tag("div", *panels, class_="panels"),
                "Deviation after a disturbance: of the state of some layers, relative to its norm, "
                "and of the first of them as its decays predict.",
            )
        )
    note = paragraph(
        "Given the tokens, a recurrent state that decays forgets every error; this says nothing of "
        "generated tokens, which feed errors back, nor of attention layers."
    )
    return section("stability", "What errors do over the length of a text", note, *parts)


def _heading(label: str, record: StabilityRecord) -> str:
    return f"{label}, {record.tokens:,} tokens of {record.text}, {record.created[:10]}"


def _disturbance(found: DeviationRecord) -> str:
    if found.what == "input":
        return f"inputs off by one {found.dtype} rounding at every token"
    return f"states off once by {found.size:g} of their norm"


def has_decays(record: StabilityRecord) -> bool:
    """Whether a half-life of the record can be drawn."""
    return any(math.isfinite(_life(head.exponent)) for one in record.layers for head in one.heads)


def _life(exponent: float | None) -> float:
    return math.inf if exponent is None else half_life(exponent)


def half_life_chart(title: str, record: StabilityRecord, series: int = 0) -> Markup:
    """A strip for each layer; layers without a decay have a note."""
    rows = [
        Strip(
            f"layer {layer.layer}",
            tuple(_life(head.exponent) for head in layer.heads),
            tuple(_life(head.start) for head in layer.heads if head.start is not None),
            None if layer.heads else layer.mixer,
        )
        for layer in record.layers
    ]
    name = f"Half-lives, {title}"
    return strips(name, rows, x_name="half-life, tokens", series=series, show=format_tokens)


def joined_blocks(block_kl: Sequence[float]) -> list[tuple[float, float]]:
    """Positions and mean KL of groups of blocks that grow with the position."""
    points, begin = [], 0
    while begin < len(block_kl):
        end = max(begin + 1, math.ceil(begin * MIN_RATIO))
        part = block_kl[begin : min(end, len(block_kl))]
        middle = BLOCK_TOKENS * (begin + len(part) / 2)
        points.append((middle, sum(part) / len(part)))
        begin += len(part)
    return points


def precision_chart(found: Mapping[str, StabilityRecord], series: Mapping[str, int]) -> Markup:
    """Mean KL over positions, a line a model."""
    curves = [
        Line(label, series[label], tuple(joined_blocks(record.precision.block_kl)), marked=True)
        for label, record in found.items()
        if record.precision is not None
    ]
    return lines(
        "KL from fp32",
        curves,
        x_name="position, tokens",
        y_name="mean KL, nats",
        log_x=True,
        log_y=True,
    )


def has_points(found: DeviationRecord) -> bool:
    return any(value > 0 for values in found.layers.values() for value in values)


def deviation_lines(found: DeviationRecord) -> list[Line]:
    """|dS| / |S| of the first, a middle and the last layer, and what the decays predict."""
    layers = list(found.layers)
    shown = dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1]))
    curves = [
        _curve(f"layer {layer}", number, found.tokens, found.layers[layer])
        for number, layer in enumerate(shown)
    ]
    if found.predicted:
        # States of fp32 cannot follow the prediction below their rounding.
        floor = min(value for line in curves for _, value in line.points if value > 0)
        predicted = [value if value >= floor else math.nan for value in found.predicted]
        name = f"layer {layers[0]}, predicted"
        curves.append(_curve(name, len(curves), found.tokens, predicted))
    return curves


def deviation_chart(title: str, found: DeviationRecord) -> Markup:
    """The lines of `deviation_lines` over tokens since the disturbance."""
    return lines(
        f"Deviation, {title}, {_disturbance(found)}",
        deviation_lines(found),
        x_name="tokens since",
        y_name="|dS| / |S|",
        log_x=True,
        log_y=True,
    )


def _legend(curves: Sequence[Line]) -> dict[str, int]:
    return {line.label: line.series for line in curves}


def _curve(label: str, series: int, tokens: Sequence[int], values: Sequence[float]) -> Line:
    """A line without the zeros that a logarithmic axis cannot show."""
    points = (
        (float(at), value if value > 0 else math.nan)
        for at, value in zip(tokens, values, strict=True)
    )
    return Line(label, series, tuple(points))


def _memory_table(found: Mapping[str, StabilityRecord]) -> Markup:
    rows = [
        (
            f"{label}, layer {layer.layer}",
            layer.mixer,
            *(f"{value:.4f}" for value in _range([head.exponent for head in layer.heads])),
            format_tokens(max(_life(head.exponent) for head in layer.heads)),
            f"{max(head.certified for head in layer.heads):.1e}",
        )
        for label, record in found.items()
        for layer in record.layers
        if layer.heads
    ]
    heading = ("layer", "mixer", "largest", "smallest", "half-life", "certified at most")
    return table("Mean log gamma of the heads, per token", heading, rows)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return max(values), min(values)


def _precision_table(found: Mapping[str, StabilityRecord]) -> Markup:
    rows = [
        (
            f"{label}, {record.precision.dtype}",
            f"{span.begin:,} to {span.end - 1:,}",
            f"{span.mean_kl:.1e}",
            f"{span.largest_kl:.1e}",
            f"{span.largest_difference:.3f}",
            f"{span.same_top1:.1%}",
        )
        for label, record in found.items()
        if record.precision is not None
        for span in record.precision.spans
    ]
    heading = ("model", "positions", "mean KL", "largest KL", "max |difference|", "same top-1")
    return table("Logits against fp32 by spans of positions", heading, rows)


def write_stability_pictures(folder: Path, record: StabilityRecord) -> None:
    """Write the charts of one model as SVG files, as far as it has them."""
    if has_decays(record):
        write_svg(folder / "half-lives.svg", half_life_chart(record.name, record))
    if record.precision is not None and any(record.precision.block_kl):
        chart = precision_chart({record.name: record}, {record.name: 0})
        write_svg(folder / "precision.svg", chart)
    for found in record.deviations:
        if has_points(found):
            names = _legend(deviation_lines(found))
            chart = deviation_chart(record.name, found)
            write_svg(folder / f"deviation-{found.what}.svg", chart, names)
