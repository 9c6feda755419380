"""Sections on answers: examples side by side, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmmamba_cli.evaluate.result import RulePart
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.differences import Difference, sentence
from mmmamba_cli.reporting.examples import Example, Said
from mmmamba_cli.reporting.html import Markup, figure, paragraph, section, table, tag
from mmmamba_cli.reporting.run_contents import Evaluated, parts_by_label

GUESSING = (50.0, "guessing")
RIGHT, WRONG = "✓", "✗"


def examples_section(suite: Suite, examples: Sequence[Example]) -> Markup:
    """Pictures, questions and each model's answers."""
    labels = [said.label for said in examples[0].asked[0].said]
    return section(
        f"examples-{suite.name}",
        f"Answers side by side: {', '.join(labels)}",
        paragraph(
            "The first picture of each category, taken by its place in the table and not by what "
            f"was answered. {RIGHT} is right, {WRONG} is wrong."
        ),
        tag("div", *(_example(example) for example in examples), class_="cards"),
    )


def _example(example: Example) -> Markup:
    picture = None
    if example.picture is not None:
        # What can be seen is told by the questions; there is no other description of a scene.
        picture = tag(
            "img",
            src=example.picture,
            alt=f"Picture of row {example.number}, category {example.category}; "
            "the table below asks about it",
            loading="lazy",
        )
    labels = [said.label for said in example.asked[0].said]
    rows = [
        (one.question, one.answer, *(_said(said) for said in one.said)) for one in example.asked
    ]
    caption = example.category
    if example.left_out:
        caption += f" ({example.left_out} more questions not shown)"
    return tag(
        "article",
        picture,
        table(caption, ("question", "right answer", *labels), rows, words=True),
        class_="card",
    )


def _said(said: Said) -> Markup:
    shown = said.text if said.text.strip() else "(nothing)"
    if said.right is None:
        return tag("span", shown)
    mark, word = (RIGHT, "right: ") if said.right else (WRONG, "wrong: ")
    return tag(
        "span",
        tag("span", f"{mark} ", aria_hidden="true"),
        tag("span", word, class_="unseen"),
        shown,
        class_="right" if said.right else "wrong",
    )


def accuracy_section(
    suite: Suite | None,
    results: Sequence[Evaluated],
    series: Mapping[str, int],
    differences: Sequence[Difference],
) -> Markup:
    """A panel of bars for each metric of the first rule, with intervals; numbers beside them."""
    first = results[0].result
    parts = parts_by_label(results)
    if not parts:
        return section(
            f"scores-{first.suite}",
            first.title,
            paragraph("Its answers need a judge; they are in predictions.tsv beside each result."),
        )
    metrics = list(
        dict.fromkeys(
            name
            for part in parts.values()
            for name, value in part.metrics.items()
            if value is not None
        )
    )
    guessing = GUESSING if suite is not None and suite.choices == ("Yes", "No") else None
    panels = [
        tag("div", tag("h3", metric), _panel(first.title, metric, parts, series, guessing))
        for metric in metrics
    ]
    used = sorted({one.result.data.used for one in results})
    asked = " or ".join(f"{count:,}" for count in used)
    rules = list(dict.fromkeys(f"“{part.rule}”" for part in parts.values()))
    return section(
        f"scores-{first.suite}",
        f"{first.title}: {', '.join(parts)}",
        paragraph(
            f"{asked} questions by the rule {' or '.join(rules)}. Whiskers are "
            f"{first.level:.0%} intervals over {first.draws:,} seeded draws of whole pictures: "
            "bars whose whiskers overlap much may differ by chance."
        ),
        _different_rules(parts) if rules[1:] else None,
        paragraph(suite.note) if suite is not None and suite.note else None,
        *(paragraph(sentence(one), class_="found") for one in differences),
        figure(
            tag("div", *panels, class_="panels"),
            "Higher is better."
            + (f" The dashed line is {guessing[1]}: {guessing[0]:g}." if guessing else ""),
            _numbers(metrics, parts),
        ),
        *_same_answer(results),
        *_unreadable(parts),
    )


def _different_rules(parts: Mapping[str, RulePart]) -> Markup:
    listed = ", ".join(f"{label} by “{part.rule}”" for label, part in parts.items())
    return paragraph(
        f"The models have no rule in common: {listed}. These scores are not comparable; "
        "mmmamba eval scores the answers that are kept again, without asking again."
    )


def _panel(
    title: str,
    metric: str,
    parts: Mapping[str, RulePart],
    series: Mapping[str, int],
    guessing: tuple[float, str] | None,
) -> Markup:
    rows = [
        Bar(label, value, series[label], part.intervals.get(metric))
        for label, part in parts.items()
        if (value := part.metrics.get(metric)) is not None
    ]
    highest = max(row.value for row in rows)
    # Shares are shown against all there is to have; sums of points against the best.
    high = 100.0 if highest <= 100 else None
    return bars(
        f"{title}, {metric}",
        rows,
        high=high,
        reference=guessing if high else None,
        show=lambda value: f"{value:.1f}",
    )


def _numbers(metrics: Sequence[str], parts: Mapping[str, RulePart]) -> Markup:
    rows = []
    for metric in metrics:
        cells = []
        for part in parts.values():
            low, high = part.intervals.get(metric, (None, None))
            value = part.metrics.get(metric)
            span = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
            cells.append(None if value is None else f"{value:.1f}{span}")
        rows.append((metric, *cells))
    return table("Score and 95 % interval", ("", *parts), rows)


def _same_answer(results: Sequence[Evaluated]) -> list[Markup]:
    """Who says the same to every question looks at nothing, which its interval does not tell."""
    found = []
    for one in results:
        said = {cell["prediction"].strip() for cell in one.answers.values()}
        if len(said) == 1 and len(one.answers) > 1:
            found.append(
                paragraph(
                    f"{one.label} answered {said.pop()!r} to all {len(one.answers):,} questions: "
                    "its score says how often that is right, and nothing of what it sees."
                )
            )
    return found


def _unreadable(parts: Mapping[str, RulePart]) -> list[Markup]:
    """Answers that no rule could read count as wrong, which must be said."""
    return [
        paragraph(
            f"{label}: {part.counts['unreadable']} answers could not be read and count as wrong, "
            f"as {', '.join(repr(one.answer[:40]) for one in part.unreadable)}."
        )
        for label, part in parts.items()
        if part.counts.get("unreadable")
    ]
