"""Draw the README's pictures: measured results (result-light.svg, result-dark.svg), scene.png.

    python docs/make_readme_pictures.py

Scores and costs of the shipped models are read from benchmarks/results. The figures that are drawn
are stored in each picture, so that a test can compare them with the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.plugins import load_reference
from mmmamba_cli.profiling import read_profile
from mmmamba_cli.reporting.chart_scales import Scale
from mmmamba_cli.reporting.crossing import crossings, round_context
from mmmamba_cli.reporting.html import Markup, tag

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
SCORES, PROFILE = "scenes_retention_cpu.json", "profile_scenes_long_cpu.json"
COMMAND = "python docs/make_readme_pictures.py"
SCENE, SCENE_SEED = DOCS / "scene.png", 7
PICTURES = {theme: DOCS / f"result-{theme}.svg" for theme in ("light", "dark")}

MODELS = ("teacher", "hybrid", "linear")
TEACHER = "teacher"
LAYERS = {
    "teacher": "attention in 8 of 8 layers",
    "hybrid": "attention in 2 of 8 layers",
    "linear": "no attention",
}
SUITES = {
    "scenes": "Drawings of its lessons",
    "scenes-unseen": "Drawings of another vendor",
}
# Every question has two answers.
CHANCE = 50.0

# The first three colours of `mmmamba report`, then ink, soft ink, rules and ground.
COLOURS = {
    "light": ("#0072b2", "#b35900", "#007a5a", "#1c1e21", "#555b63", "#d9dde2", "#ffffff"),
    "dark": ("#6bb7ec", "#f2a65a", "#4fc9a2", "#e8eaed", "#a4abb5", "#363b43", "#0d1117"),
}

# All sizes are in pixels.
WIDTH, HEIGHT, PANEL = 700, 452, 350
ROW = 26
PLOT_LEFT, PLOT_RIGHT = 34, 246
COLUMNS = (196, 250, 338)


# A value and the ends of its interval.
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Figures:
    """What is drawn: scores in percent, and costs of decoding one row by context in tokens.

    `scores`, and of students what is `kept` of the teacher's, whole and `above_chance`, are (value,
    low, high) by suite and model, with 95 % intervals; `milliseconds` of a
    token and `mebibytes` of weights and cache are (context, value) by model; `crossings` are the
    contexts from which on a student is faster than its teacher, on a CPU with `threads`.
    """

    scores: dict[str, dict[str, Interval]]
    kept: dict[str, dict[str, Interval]]
    above_chance: dict[str, dict[str, Interval]]
    milliseconds: dict[str, list[tuple[int, float]]]
    mebibytes: dict[str, list[tuple[int, float]]]
    crossings: dict[str, float]
    threads: int

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def read_figures(folder: Path = RESULTS) -> Figures:
    """Read the figures from the results.

    Raises `ValueError` if a student is not slower than the teacher first and faster later.
    """
    measured = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    scores: dict[str, dict[str, Interval]] = {suite: {} for suite in SUITES}
    for result in measured["results"]:
        rule = result["rules"][0]
        found = (rule["metrics"]["mean"], *rule["intervals"]["mean"])
        scores[result["suite"]][_short(result["model"]["name"])] = found
    kept: dict[str, dict[str, Interval]] = {suite: {} for suite in SUITES}
    above: dict[str, dict[str, Interval]] = {suite: {} for suite in SUITES}
    for one in measured["retention"]:
        place = one["suite"], _short(one["student"])
        kept[place[0]][place[1]] = _percent(one["ratio"], one["interval"])
        above[place[0]][place[1]] = _percent(one["above_chance"], one["above_chance_interval"])
    profile = read_profile(folder / PROFILE)
    times: dict[str, list[tuple[int, float]]] = {name: [] for name in MODELS}
    memory: dict[str, list[tuple[int, float]]] = {name: [] for name in MODELS}
    for point in profile.measurements:
        if point.task == "decode" and point.median and point.memory:
            name = _short(point.subject)
            times[name].append((point.context, 1000 * point.median))
            memory[name].append((point.context, point.memory.total / 2**20))
    faster = {_short(one.student): one.at for one in crossings(profile, "decode")}
    crossed = {name: at for name, at in faster.items() if at is not None}
    if set(crossed) != set(MODELS[1:]):
        raise ValueError(f"{PROFILE}: a student's times do not cross the teacher's")
    return Figures(scores, kept, above, times, memory, crossed, profile.device.threads)


def _short(model: str) -> str:
    return model.removeprefix("scenes-")


def _percent(ratio: float, interval: Sequence[float]) -> Interval:
    return (100 * ratio, 100 * interval[0], 100 * interval[1])


def picture(figures: Figures, theme: str) -> str:
    """The SVG of a theme, "light" or "dark"."""
    suites = [
        _scores(title, figures, suite, PANEL * number)
        for number, (suite, title) in enumerate(SUITES.items())
    ]
    costs = [
        _curves(
            f"Milliseconds per token, {figures.threads} CPU cores",
            figures.milliseconds,
            figures.crossings,
            0,
        ),
        _curves("MiB of weights and cache", figures.mebibytes, {}, PANEL),
    ]
    svg = tag(
        "svg",
        tag("metadata", figures.as_json()),
        tag("style", Markup(_style(COLOURS[theme]))),
        tag("rect", width=WIDTH, height=HEIGHT, class_="ground"),
        _legend(),
        *suites,
        *costs,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=WIDTH,
        height=HEIGHT,
        role="img",
        aria_label=description(figures),
    )
    return f"{svg}\n"


def description(figures: Figures) -> str:
    """The picture in words."""
    kept = "; ".join(
        f"{suite}: {model} {figures.scores[suite][model][0]:.1f} %"
        for suite in SUITES
        for model in MODELS
    )
    faster = ", ".join(
        f"{model} from {round_context(at)}" for model, at in figures.crossings.items()
    )
    return (
        f"Questions answered right, chance 50 %. {kept}. Faster than the teacher: {faster} tokens."
    )


def _legend() -> Markup:
    parts = []
    for number, (model, x) in enumerate(zip(MODELS, (2, 252, 502), strict=True)):
        parts += [
            _marker(number, x + 6.0, 15.0),
            tag("text", model, x=x + 18, y=19, class_="strong"),
            tag("text", LAYERS[model], x=x + 80, y=19, class_="soft"),
        ]
    return tag("g", *parts)


def _scores(title: str, figures: Figures, suite: str, left: int) -> Markup:
    """Dots with intervals from chance to 100 percent, and what is kept of the teacher's score."""
    top, bottom = 84, 84 + len(MODELS) * ROW
    x = Scale(CHANCE, 100.0, 8, 146)
    parts = [tag("text", f"{title}: answers right", x=8, y=50, class_="strong")]
    heads = ("%", "kept", "above chance")
    parts += [
        tag("text", head, x=right, y=72, class_="soft end")
        for head, right in zip(heads, COLUMNS, strict=True)
    ]
    for value, label in ((CHANCE, "chance 50"), (75, None), (100, "100")):
        parts += [
            tag("line", x1=x(value), x2=x(value), y1=top - 8, y2=bottom - 6, class_="grid"),
            tag(
                "text",
                label,
                x=x(value),
                y=bottom + 9,
                class_="soft start" if value == CHANCE else "soft middle",
            ),
        ]
    for number, model in enumerate(MODELS):
        mean, low, high = figures.scores[suite][model]
        y = top + number * ROW + 4.0
        cells = [f"{mean:.1f}"]
        if model != TEACHER:
            shares = (figures.kept[suite][model], figures.above_chance[suite][model])
            cells += [f"{share[0]:.1f} %" for share in shares]
        parts += [
            tag(
                "path",
                d=f"M{x(low):.2f} {y - 4}v8M{x(high):.2f} {y - 4}v8M{x(low):.2f} {y}H{x(high):.2f}",
                class_=f"line c{number}",
            ),
            _marker(number, x(mean), y),
            *(
                tag("text", cell, x=right, y=y + 4, class_="end")
                for cell, right in zip(cells, COLUMNS, strict=False)
            ),
        ]
    return tag("g", *parts, transform=f"translate({left} 0)")


def _curves(
    title: str,
    values: Mapping[str, Sequence[tuple[int, float]]],
    marks: Mapping[str, float],
    left: int,
) -> Markup:
    """A line for each model over the context, both axes logarithmic, with labelled crossings."""
    top, bottom = 222.0, 412.0
    contexts = [context for context, _ in values[TEACHER]]
    every = [value for points in values.values() for _, value in points]
    x = Scale(contexts[0], contexts[-1], PLOT_LEFT, PLOT_RIGHT, log=True)
    y = Scale(min(every) * 0.8, max(every) * 1.15, bottom, top, log=True)
    parts = [tag("text", title, x=8, y=204, class_="strong")]
    parts += _axes(x, y, contexts)
    for number, model in enumerate(MODELS):
        points = [(x(context), y(value)) for context, value in values[model]]
        path = "L".join(f"{a:.2f} {b:.2f}" for a, b in points)
        last = values[model][-1][1]
        parts += [
            tag("path", d=f"M{path}", class_=f"line c{number}"),
            *(_marker(number, *point) for point in points),
            tag("text", f"{model} {last:.3g}", x=PLOT_RIGHT + 8, y=points[-1][1] + 4),
        ]
    # From the right, so that no line crosses a label.
    ordered = sorted(marks.items(), key=lambda item: item[1])
    for row, (model, at) in enumerate(ordered):
        parts += _crossing(
            MODELS.index(model), f"{model} faster from {round_context(at)}", x(at), row
        )
    return tag("g", *parts, transform=f"translate({left} 0)")


def _axes(x: Scale, y: Scale, contexts: Sequence[int]) -> list[Markup]:
    parts = []
    for value in y.ticks():
        parts += [
            tag("line", x1=PLOT_LEFT, x2=PLOT_RIGHT, y1=y(value), y2=y(value), class_="grid"),
            tag("text", f"{value:g}", x=PLOT_LEFT - 5, y=y(value) + 4, class_="soft end"),
        ]
    for context in contexts:
        words = f"{context // 1024}K" if context >= 1024 else str(context)
        parts.append(tag("text", words, x=x(context), y=y.begin + 16, class_="soft middle"))
    middle = (PLOT_LEFT + PLOT_RIGHT) / 2
    parts.append(tag("text", "tokens of context", x=middle, y=y.begin + 33, class_="soft middle"))
    return parts


def _crossing(number: int, words: str, place: float, row: int) -> list[Markup]:
    """A dashed line with its label at the right of its lower end; later ones end above."""
    bottom = 412 - 16 * row
    return [
        tag("line", x1=place, x2=place, y1=226, y2=bottom, class_=f"line dashed c{number}"),
        tag("text", words, x=place + 5, y=bottom - 3, class_="small"),
    ]


def _marker(number: int, x: float, y: float) -> Markup:
    """A circle, a triangle or a square: colour alone tells nothing."""
    if number == 0:
        return tag("circle", cx=x, cy=y, r=3.8, class_=f"fill c{number}")
    outline = ("l4.4 8h-8.8z", "h7v7h-7z")[number - 1]
    start = ((x, y - 4.8), (x - 3.5, y - 3.5))[number - 1]
    return tag("path", d=f"M{start[0]:.2f} {start[1]:.2f}{outline}", class_=f"fill c{number}")


def _style(colours: Sequence[str]) -> str:
    *models, ink, soft, rule, ground = colours
    lines = "".join(f".fill.c{i}{{fill:{c}}}.line.c{i}{{stroke:{c}}}" for i, c in enumerate(models))
    return (
        f"text{{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:{ink}}}"
        f".soft{{fill:{soft};font-size:11.5px}}.small{{font-size:11.5px}}.strong{{font-weight:600}}"
        ".end{text-anchor:end}.middle{text-anchor:middle}.start{text-anchor:start}"
        f".grid{{stroke:{rule}}}.ground{{fill:{ground}}}"
        ".line{fill:none;stroke-width:1.8}.dashed{stroke-width:1.2;stroke-dasharray:4 3}" + lines
    )


def scene() -> Any:
    """The picture that the README asks about, a `PIL.Image`."""
    return load_reference("mmmamba_evals.scenes.shipped:sample_scene")(SCENE_SEED)[0]


if __name__ == "__main__":
    scene().save(SCENE, optimize=True)
    print(f"wrote {SCENE}")
    for theme, file in PICTURES.items():
        file.write_text(picture(read_figures(), theme), encoding="utf-8")
        print(f"wrote {file}")
