"""Three lines at the end of the demo: the result, what its profile allows to say, and the page."""

from __future__ import annotations

from pathlib import Path

from demo_steps import PAGE, SEEDED, UNSEEDED

from mmmamba_cli.evaluate.result import EVALS, RESULT, Result, matching_value, read_result
from mmmamba_cli.profiling import report
from mmmamba_cli.profiling.interfaces import TUNED
from mmmamba_cli.profiling.result import DECODE, PROFILE_FILE, Profile, read_profile

SHIPPED = {"scenes-linear": "the shipped linear student", "scenes-hybrid": "the shipped hybrid"}


def summary(folder: Path) -> list[str]:
    """The lines, read from the files of a finished demo."""
    return [
        result_sentence(folder),
        profile_sentence(read_profile(folder / SEEDED / "profile" / PROFILE_FILE)),
        f"open in a browser: {folder / PAGE}",
    ]


def result_sentence(folder: Path) -> str:
    """What the shipped students keep of their teacher's score, as evaluated in this demo."""
    teacher = read_scores(folder, "teacher")
    parts = []
    for name, what in SHIPPED.items():
        student = read_scores(folder, name)
        rule = student.rules[0]
        theirs = matching_value([teacher], student, rule)
        if rule.headline is not None and theirs:
            parts.append(f"{what} keeps {rule.headline / theirs:.0%} of its teacher's score")
    if not parts:
        return "the shipped students were not compared with their teacher"
    return f"{' and '.join(parts)} on {teacher.data.used} questions about composed scenes"


def read_scores(folder: Path, model: str) -> Result:
    return read_result(folder / UNSEEDED / EVALS / model / "scenes" / RESULT)


def profile_sentence(profile: Profile) -> str:
    """Speed at the longest context; no speed from noisy times or from a single context."""
    found = [one for one in profile.ratios if one.task == DECODE and one.baseline == TUNED]
    contexts = {one.context for one in found}
    if len(contexts) < 2:
        return "the profile has too few contexts to quote a speed"
    longest = [one for one in found if one.context == max(contexts)]
    compared = {TUNED, *(one.subject for one in longest)}
    noisy = [
        one
        for one in report.noisy_measurements(profile)
        if one.task == DECODE and one.context == max(contexts) and one.subject in compared
    ]
    if noisy:
        return (
            "the profile's times are noisy, since other programs ran on this machine: no speed is "
            "quoted"
        )
    speeds = " and ".join(f"{one.subject} {one.times_faster:.2f} times" for one in longest)
    return f"next token after {max(contexts):,} tokens: {speeds} as fast as the tuned teacher"
