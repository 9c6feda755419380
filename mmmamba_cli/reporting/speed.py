"""The lead's figure on costs: time and memory against context, with the crossing point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmmamba_cli.errors import name_some
from mmmamba_cli.profiling import Measurement, Profile
from mmmamba_cli.profiling.report import (
    MAX_QUARTILE_RANGE,
    TITLES,
    format_memory,
    format_ms,
    memory_name,
    noisy_measurements,
)
from mmmamba_cli.profiling.result import DECODE, PREFILL, Task
from mmmamba_cli.reporting.charts import Mark
from mmmamba_cli.reporting.costs import (
    PREFILL_PANEL,
    Value,
    conditions,
    memory_of,
    milliseconds_of,
    panel,
)
from mmmamba_cli.reporting.crossing import (
    Crossing,
    Pair,
    baseline_of,
    crossings,
    round_context,
    students_of,
)
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, table, tag
from mmmamba_cli.reporting.profile_tables import above_time, measured_tables, withheld_sentences
from mmmamba_cli.reporting.series_styles import legend

PANELS: tuple[tuple[str, Task, Value], ...] = (
    ("next token, ms", DECODE, milliseconds_of),
    ("memory while decoding, MiB", DECODE, memory_of),
    (PREFILL_PANEL, PREFILL, milliseconds_of),
)


def speed_sentences(profile: Profile, nouns: Mapping[str, str]) -> list[str]:
    """From which context on each student decodes faster, and by how much at the longest.

    Empty if only one context was measured. A crossing or a ratio that rests on a noisy measurement
    is left out. `nouns` are the students as a sentence names them.
    """
    found = []
    for one in by_attention(profile, crossings(profile, DECODE)):
        noun = nouns.get(one.student, one.student)
        sentences = [] if one.is_noisy else [_crossing_sentence(one, noun)]
        longest = one.longest_quiet
        if longest is not None and longest.times_faster > 1 and longest.context > (one.at or 0):
            sentences.append(_ratio_sentence("it" if sentences else noun, longest))
        if sentences:
            found.append(" ".join(sentences))
    return found


def by_attention(profile: Profile, found: Sequence[Crossing]) -> list[Crossing]:
    """Linear students first, then hybrids by their number of attention layers."""
    layers = {one.name: len(one.attention_layers) for one in profile.subjects}
    return sorted(found, key=lambda one: layers[one.student])


def headline(profile: Profile, nouns: Mapping[str, str]) -> str | None:
    """The crossings in one sentence; None unless one was measured without noise."""
    parts = [
        f"{nouns.get(one.student, one.student)} from about {round_context(one.at)} tokens"
        for one in by_attention(profile, crossings(profile, DECODE))
        if one.at is not None and not one.is_noisy
    ]
    if not parts:
        return None
    device = "CPU" if profile.device.type == "cpu" else profile.device.name
    return (
        f"On a {device}, students decode faster than the teacher in long contexts: "
        f"{', '.join(parts)} on; in shorter ones the teacher is faster."
    )


def _crossing_sentence(one: Crossing, noun: str) -> str:
    who = f"The{noun[3:]}" if noun.startswith("the ") else noun
    shortest, longest = one.pairs[0], one.pairs[-1]
    span = f"from {shortest.context:,} to {longest.context:,} tokens"
    if one.state == "faster":
        return f"{who} takes less time for a token than its teacher at all contexts, {span}."
    if one.state == "slower":
        return f"{who} does not become faster than its teacher at the contexts measured, {span}."
    assert one.at is not None
    return (
        f"{who} takes less time for a token than its teacher from a context of about "
        f"{round_context(one.at)} tokens on, and more time in shorter contexts "
        f"({_ms(shortest.student)} ms against {_ms(shortest.baseline)} at {shortest.context:,})."
    )


def _ratio_sentence(subject: str, longest: Pair) -> str:
    ours, theirs = longest.student, longest.baseline
    memory = ""
    if ours.memory is not None and theirs.memory is not None:
        memory = (
            f", with {format_memory(ours.memory.total)} of memory against "
            f"{format_memory(theirs.memory.total)}"
        )
    return (
        f"At {longest.context:,} tokens {subject} takes {_ms(ours)} ms against {_ms(theirs)} "
        f"({longest.times_faster:.1f} times as fast){memory}."
    )


def _ms(one: Measurement) -> str:
    assert one.median is not None
    return format_ms(one.median)


def speed_figure(
    profile: Profile,
    series: Mapping[str, int],
    labels: Mapping[str, str],
    nouns: Mapping[str, str],
    source: str,
) -> Markup | None:
    """Teacher and students over the context; None unless two contexts were measured.

    `labels` are the names of the profile's subjects on the page.
    """
    baseline = baseline_of(profile)
    if baseline is None or not crossings(profile, DECODE):
        return None
    names = [baseline.name, *(one.name for one in students_of(profile))]
    drawn = []
    for title, task, value in PANELS:
        marks = _marks(crossings(profile, task), series, labels) if value is milliseconds_of else []
        drawn.append(panel(profile, names, series, labels, title, task, value, marks))
    sentences = speed_sentences(profile, nouns)
    shown = {labels[name]: series[labels[name]] for name in names}
    return join_markup(
        (
            *(paragraph(sentence) for sentence in sentences),
            *(paragraph(one, class_="small") for one in _noise(profile, names, labels)),
            figure(
                join_markup((legend(shown), tag("div", *drawn, class_="panels"))),
                join_markup(
                    (
                        "Lower is better; both axes are logarithmic. A vertical line marks the "
                        "context from which on a student is faster; dotted points are noisy. "
                        "Prefill reads the prompt, before the first token. Memory is "
                        f"{memory_name(profile)}. ",
                        conditions(profile, source),
                    )
                ),
                join_markup(
                    table(title, heading, rows)  # type: ignore[arg-type]
                    for title, heading, rows in measured_tables(profile)
                ),
            ),
        )
    )


def _noise(profile: Profile, names: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """The noisy measurements of the figure, in one sentence."""
    listed = [
        f"{labels[one.subject]} ({TITLES[one.task]} at {one.context:,})"
        for one in noisy_measurements(profile)
        if one.subject in names
    ]
    wrong = withheld_sentences(profile)[-1:] if above_time(profile) else []
    if not listed:
        return wrong
    return [
        f"Noisy, with quartiles more than {MAX_QUARTILE_RANGE:.0%} of the median apart, are "
        f"{name_some(listed, 3)}: they are drawn hollow, and no sentence, line, ratio or share "
        "rests on them.",
        *wrong,
    ]


def _marks(
    found: Sequence[Crossing], series: Mapping[str, int], labels: Mapping[str, str]
) -> list[Mark]:
    return [
        Mark(
            f"{labels[one.student]} from {round_context(one.at)}",
            series[labels[one.student]],
            one.at,
        )
        for one in found
        if one.at is not None and not one.is_noisy
    ]
