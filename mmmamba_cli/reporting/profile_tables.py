"""The tables of a profile as a page shows them: without numbers that are not reliable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mmmamba_cli.errors import name_some
from mmmamba_cli.profiling import Measurement, Profile, report
from mmmamba_cli.profiling.result import MEASURED, Task

# A ratio at one context says nothing of how it changes with the context.
MIN_CONTEXTS = 2


def measured_tables(profile: Profile) -> Iterator[report.Table]:
    """The profile's tables without the contexts at which nothing was measured.

    Ratios of times and shares that rest on a noisy timing are dashes, as are ratios that are
    reliable at one context only, and the floors of a task for which one is above the time.
    """
    quiet = {title: rows for title, _, rows in report.tables(reliable(profile))}
    for title, heading, rows in report.tables(profile):
        # Memory is counted, or read apart from the timing.
        if not title.startswith("memory"):
            rows = quiet[title]
        if heading[0] == report.CONTEXT:
            rows = [row for row in rows if any(_has_number(cell) for cell in row[1:])]
        if rows:
            yield title, heading, rows


def reliable(profile: Profile) -> Profile:
    """A profile without the ratios and floors that are not reliable."""
    noisy = _noisy(profile)
    wrong = {one.task for one in above_time(profile)}
    measurements = tuple(
        one.model_copy(update={"floor": None})
        if one.task in wrong or (one.subject, one.task, one.context) in noisy
        else one
        for one in profile.measurements
    )
    quiet = [
        one
        for one in profile.ratios
        if not {(name, one.task, one.context) for name in (one.subject, one.baseline)} & noisy
    ]
    counts = Counter((one.subject, one.baseline, one.task) for one in quiet)
    ratios = tuple(
        one for one in quiet if counts[one.subject, one.baseline, one.task] >= MIN_CONTEXTS
    )
    return profile.model_copy(update={"measurements": measurements, "ratios": ratios})


def _noisy(profile: Profile) -> set[tuple[str, Task, int]]:
    return {(one.subject, one.task, one.context) for one in report.noisy_measurements(profile)}


def above_time(profile: Profile) -> list[Measurement]:
    """Measurements whose floor is above their time."""
    return [one for one in profile.measurements if one.share is not None and one.share > 1]


def withheld_sentences(profile: Profile) -> list[str]:
    """Which ratios and shares are dashes or left out, and why."""
    found = []
    left = len(reliable(profile).ratios) < len(profile.ratios)
    if left or any(one.floor is not None for one in report.noisy_measurements(profile)):
        found.append(
            "A ratio of times or a share of the floor is given only where its timings are not "
            f"noisy, and a ratio only where this holds at {MIN_CONTEXTS} contexts or more."
        )
    wrong = above_time(profile)
    if wrong:
        listed = [f"{one.subject} ({report.TITLES[one.task]} at {one.context:,})" for one in wrong]
        tasks = " and ".join(dict.fromkeys(report.TITLES[one.task] for one in wrong))
        found.append(
            f"No floor is given for {tasks}: for {name_some(listed, 3)} it is above the time, so "
            "the device was slower when its speed was measured."
        )
    return found


def skipped_sentences(profile: Profile) -> list[str]:
    """The measurements that were not made, in one sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for one in profile.measurements:
        if one.status != MEASURED:
            title = report.TITLES[one.task]
            reasons.setdefault(one.status.removeprefix("skipped: "), []).append(
                f"{one.subject} ({title} at {one.context:,})"
            )
    return [
        f"Not measured, because {_because(reason)}: {name_some(listed, 6)}."
        for reason, listed in reasons.items()
    ]


def _because(reason: str) -> str:
    return {
        "over budget": "the time given by --budget was spent",
        "out of memory": "memory was not enough",
        "a shorter one was out of memory": "a shorter context was out of memory",
    }.get(reason, reason)


def remark_sentences(profile: Profile) -> list[str]:
    """Warnings of the profile; those on single skipped measurements are one sentence elsewhere."""
    skipped = {one.status for one in profile.measurements} - {MEASURED}
    return [
        f"{remark[:1].upper()}{remark[1:]}."
        for remark in report.remarks(profile)
        if not any(f": {status} (" in remark for status in skipped)
    ]


def correctness_sentence(profile: Profile) -> str:
    """The result of the check of the decoders before anything was timed."""
    gate = profile.gate
    worst = max((value for ways in gate.distances.values() for value in ways.values()), default=0)
    if not gate.green:
        return report.correctness_line(profile)
    return (
        "Before anything was timed, every decoder was checked, and all passed. Compared were "
        f"{gate.what} of at most {worst:.1g}; {gate.tolerance:.1g} is allowed."
    )


def _has_number(cell: object) -> bool:
    return any(character.isdigit() for character in str(cell))
