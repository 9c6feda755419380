"""Sections on answers: examples side by side, and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmmamba_cli.evaluate.result import RuleResult
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.comparisons import ScoreDifference, difference_sentence
from mmmamba_cli.reporting.examples import Example, ModelAnswer
from mmmamba_cli.reporting.html import Markup, figure, paragraph, section, table, tag
from mmmamba_cli.reporting.run_contents import ModelResult, parts_by_label

GUESSING = (50.0, "guessing")
RIGHT, WRONG = "✓", "✗"


def examples_section(suite: Suite, examples: Sequence[Example]) -> Markup:
    """Images, questions and each model's answers."""
    labels = [answer.label for answer in examples[0].questions[0].answers]
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
        # The questions describe the image; there is no other description.
        picture = tag(
            "img",
            src=example.picture,
            alt=f"Picture of row {example.number}, category {example.category}; "
            "the table below asks about it",
            loading="lazy",
        )
    labels = [answer.label for answer in example.questions[0].answers]
    rows = [(one.question, one.answer, *map(_answer, one.answers)) for one in example.questions]
    caption = example.category
    if example.left_out:
        caption += f" ({example.left_out} more questions not shown)"
    return tag(
        "article",
        picture,
        table(caption, ("question", "right answer", *labels), rows, words=True),
        class_="card",
    )


def _answer(answer: ModelAnswer) -> Markup:
    shown = answer.text if answer.text.strip() else "(nothing)"
    if answer.right is None:
        return tag("span", shown)
    mark, word = (RIGHT, "right: ") if answer.right else (WRONG, "wrong: ")
    return tag(
        "span",
        tag("span", f"{mark} ", aria_hidden="true"),
        tag("span", word, class_="unseen"),
        shown,
        class_="right" if answer.right else "wrong",
    )


def accuracy_section(
    suite: Suite | None,
    results: Sequence[ModelResult],
    series: Mapping[str, int],
    differences: Sequence[ScoreDifference],
) -> Markup:
    """A panel of bars with intervals per metric of the first rule, and the numbers as a table."""
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
        *(paragraph(difference_sentence(one), class_="found") for one in differences),
        figure(
            tag("div", *panels, class_="panels"),
            "Higher is better."
            + (f" The dashed line is {guessing[1]}: {guessing[0]:g}." if guessing else ""),
            _numbers(metrics, parts),
        ),
        *_same_answer(results),
        *_unreadable(parts),
    )


def _different_rules(parts: Mapping[str, RuleResult]) -> Markup:
    listed = ", ".join(f"{label} by “{part.rule}”" for label, part in parts.items())
    return paragraph(
        f"The models have no rule in common: {listed}. These scores are not comparable; "
        "mmmamba eval scores the answers that are kept again, without asking again."
    )


def _panel(
    title: str,
    metric: str,
    parts: Mapping[str, RuleResult],
    series: Mapping[str, int],
    guessing: tuple[float, str] | None,
) -> Markup:
    rows = [
        Bar(label, value, series[label], part.intervals.get(metric))
        for label, part in parts.items()
        if (value := part.metrics.get(metric)) is not None
    ]
    highest = max(row.value for row in rows)
    # Percentages end at 100, sums of points at the highest.
    high = 100.0 if highest <= 100 else None
    return bars(
        f"{title}, {metric}",
        rows,
        high=high,
        reference=guessing if high else None,
        show=lambda value: f"{value:.1f}",
    )


def _numbers(metrics: Sequence[str], parts: Mapping[str, RuleResult]) -> Markup:
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


def _same_answer(results: Sequence[ModelResult]) -> list[Markup]:
    """Flag models that give one constant answer; confidence intervals do not show it."""
    found = []
    for one in results:
        texts = {cell["prediction"].strip() for cell in one.answers.values()}
        if len(texts) == 1 and len(one.answers) > 1:
            found.append(
                paragraph(
                    f"{one.label} answered {texts.pop()!r} to all {len(one.answers):,} questions: "
                    "its score says how often that is right, and nothing of what it sees."
                )
            )
    return found


def _unreadable(parts: Mapping[str, RuleResult]) -> list[Markup]:
    """Flag answers that the rule could not parse; they count as wrong."""
    return [
        paragraph(
            f"{label}: {part.counts['unreadable']} answers could not be read and count as wrong, "
            f"as {', '.join(repr(one.answer[:40]) for one in part.unreadable)}."
        )
        for label, part in parts.items()
        if part.counts.get("unreadable")
    ]
