"""Sections on answers: examples side by side, and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmmamba_cli.evaluate.result import RuleResult
from mmmamba_cli.evaluate.suite import Suite
from mmmamba_cli.reporting.charts import Bar, bars
from mmmamba_cli.reporting.comparisons import ScoreDifference, difference_sentence
from mmmamba_cli.reporting.examples import Example, ModelAnswer, QuestionAnswers
from mmmamba_cli.reporting.html import (
    Child,
    Markup,
    figure,
    join_markup,
    paragraph,
    section,
    table,
    tag,
)
from mmmamba_cli.reporting.interval_filter import MIN_UNITS, lacks_intervals
from mmmamba_cli.reporting.retention import Kept, chance_of, retention_table
from mmmamba_cli.reporting.run_contents import ModelResult, parts_by_label
from mmmamba_cli.reporting.series_styles import swatch

GUESSING = "chance"
FEW_PICTURES = (
    f" A score from fewer than {MIN_UNITS} pictures, or a mean over categories of which one has "
    "fewer, has no interval."
)
RIGHT, WRONG = "✓", "✗"


def examples_section(
    suite: Suite, examples: Sequence[Example], series: Mapping[str, int]
) -> Markup:
    """Images, questions and each model's answers."""
    labels = [answer.label for answer in examples[0].questions[0].answers]
    return section(
        f"examples-{suite.name}",
        f"Answers side by side: {', '.join(labels)}",
        paragraph(
            "The first picture of each category, taken by its place in the table and not by what "
            f"was answered. {RIGHT} is right, {WRONG} is wrong."
        ),
        tag(
            "details",
            tag("summary", f"{len(examples)} pictures and the answers of {len(labels)} models"),
            example_cards(examples, series),
        ),
    )


def example_cards(examples: Sequence[Example], series: Mapping[str, int]) -> Markup:
    """A card per picture: the picture above the questions, and the answers below each."""
    return tag("div", *(_example(example, series) for example in examples), class_="cards")


def _example(example: Example, series: Mapping[str, int]) -> Markup:
    picture = None
    if example.picture is not None:
        # The questions describe the image; there is no other description.
        picture = tag(
            "img",
            src=example.picture,
            alt=f"Picture of row {example.number}, category {example.category}; "
            "the questions below are about it",
            loading="lazy",
        )
    more = None
    if example.left_out:
        more = paragraph(f"{example.left_out} more questions not shown", class_="small")
    questions = (_question(one, series) for one in example.questions)
    return tag("article", tag("h3", example.category), picture, *questions, more, class_="card")


def _question(one: QuestionAnswers, series: Mapping[str, int]) -> Markup:
    asked = paragraph(
        one.question,
        tag("span", f" (right answer: {one.answer})", class_="small"),
        class_="question",
    )
    answers = (
        tag("li", tag("span", swatch(series[each.label]), " ", each.label), _answer(each))
        for each in one.answers
    )
    return join_markup((asked, tag("ul", *answers, class_="answers")))


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
    kept: Sequence[Kept] = (),
) -> Markup:
    """The first rule's headline as bars with intervals, retention, and the other metrics folded."""
    first = results[0].result
    parts = parts_by_label(results)
    if not parts:
        return section(
            f"scores-{first.suite}",
            first.title,
            paragraph("Its answers need a judge; they are in predictions.tsv beside each result."),
        )
    metrics = _metric_names(parts)
    part = next(iter(parts.values()))
    headline = part.metric if part.metric in metrics else metrics[0]
    chances = {metric: chance_of(suite, metric, part) for metric in metrics}
    panels = {
        metric: tag(
            "div", tag("h3", metric), _panel(first.title, metric, parts, series, chances[metric])
        )
        for metric in metrics
    }
    others = [panel for metric, panel in panels.items() if metric != headline]
    rules = list(dict.fromkeys(f"“{part.rule}”" for part in parts.values()))
    return section(
        f"scores-{first.suite}",
        f"{first.title}: {', '.join(parts)}",
        _intervals_paragraph(results, parts, rules),
        _different_rules(parts) if rules[1:] else None,
        paragraph(suite.note) if suite is not None and suite.note else None,
        *(paragraph(difference_sentence(one), class_="found") for one in differences),
        figure(
            tag("div", panels[headline], class_="panels"),
            "Higher is better."
            + (
                ""
                if chances[headline] is None
                else f" The dashed line is {GUESSING}: {chances[headline]:g}."
            ),
        ),
        retention_table("What each student keeps of the teacher's score", kept) if kept else None,
        tag(
            "details",
            tag("summary", "Scores by category, and the numbers as a table"),
            tag("div", *others, class_="panels") if others else None,
            _numbers(metrics, parts, chances),
        ),
        *_same_answer(results),
        *_unreadable(parts),
    )


def _metric_names(parts: Mapping[str, RuleResult]) -> list[str]:
    """Names of the metrics that have a value."""
    given = (item for part in parts.values() for item in part.metrics.items())
    return list(dict.fromkeys(name for name, value in given if value is not None))


def _intervals_paragraph(
    results: Sequence[ModelResult], parts: Mapping[str, RuleResult], rules: Sequence[str]
) -> Markup:
    """How many questions were asked, the rules that scored them, and what the whiskers are."""
    first = results[0].result
    asked = " or ".join(f"{count:,}" for count in sorted({one.result.data.used for one in results}))
    return paragraph(
        f"{asked} questions by the rule {' or '.join(rules)}. Whiskers are "
        f"{100 * first.level:.0f} % intervals over {first.draws:,} seeded draws of whole "
        "pictures: bars whose whiskers overlap much may differ by chance."
        + (FEW_PICTURES if lacks_intervals(list(parts.values())) else "")
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
    chance: float | None,
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
        reference=(chance, GUESSING) if high and chance is not None else None,
        show=lambda value: f"{value:.1f}",
    )


def _numbers(
    metrics: Sequence[str],
    parts: Mapping[str, RuleResult],
    chances: Mapping[str, float | None],
) -> Markup:
    """A row per model and a column per metric; the last row is chance."""
    rows: list[tuple[Child, ...]] = []
    for label, part in parts.items():
        cells = []
        for metric in metrics:
            low, high = part.intervals.get(metric, (None, None))
            value = part.metrics.get(metric)
            span = "" if low is None or high is None else f" ({low:.1f} to {high:.1f})"
            cells.append(None if value is None else f"{value:.1f}{span}")
        rows.append((label, *cells))
    if any(value is not None for value in chances.values()):
        guessed = (None if chances[one] is None else f"{chances[one]:g}" for one in metrics)
        rows.append(("chance", *guessed))
    return table("Score and 95 % interval", ("", *metrics), rows)


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
