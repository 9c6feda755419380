"""Scores that random guesses are expected to have, and retention above them.

A guess takes each answer with the same probability. Where the answers that a guess takes from are
not known, as for open questions, there is no such score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Accuracy x 100 of guesses between yes and no, and of both guesses about a picture being right.
YES_NO_CHANCE, YES_NO_PAIR_CHANCE = 50.0, 25.0


def f1_chance(yes_share: float) -> dict[str, float]:
    """F1 and its parts, x 100, of guesses where `yes_share` of the right answers are yes.

    Precision is the share p, recall 1/2, so F1 = 2 p (1/2) / (p + 1/2): a ratio of expected counts.
    """
    return {
        "F1": 100 * yes_share / (yes_share + 0.5),
        "accuracy": YES_NO_CHANCE,
        "precision": 100 * yes_share,
        "recall": 50.0,
    }


def option_chance(option_counts: Sequence[int]) -> float | None:
    """Accuracy x 100 of guesses among each row's options; None if a row has no options."""
    if not option_counts or 0 in option_counts:
        return None
    return 100 * sum(1 / count for count in option_counts) / len(option_counts)


def circular_chance(option_counts: Mapping[str, Sequence[int]]) -> float | None:
    """Circular accuracy x 100 of guesses: all turns of a question right, by question.

    None if a row has no options.
    """
    if not option_counts or any(0 in counts for counts in option_counts.values()):
        return None
    total = 0.0
    for counts in option_counts.values():
        share = 1.0
        for count in counts:
            share /= count
        total += share
    return 100 * total / len(option_counts)


def above_chance(student: float, teacher: float, chance: float) -> float | None:
    """(student - chance) / (teacher - chance); None unless the teacher is better than chance.

    Raw retention flatters a student: one that guesses between two answers retains more than half.
    """
    return (student - chance) / (teacher - chance) if teacher > chance else None
