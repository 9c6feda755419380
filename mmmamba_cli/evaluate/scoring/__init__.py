"""Scoring rules: pure functions from rows and answers to `UnitScores`, named by suites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.choices import (
    choice_circular_2024_02,
    choice_circular_2025_08,
    choice_circular_2026_06,
    choice_rows_2024_02,
    choice_rows_2025_08,
    choice_rows_2026_06,
)
from mmmamba_cli.evaluate.scoring.unit_scores import Tally, UnitScores
from mmmamba_cli.evaluate.scoring.vqa import (
    exact_gqa,
    exact_plain,
    vqa_evalai,
    vqa_words_2024_01,
    vqa_words_2025_05,
)
from mmmamba_cli.evaluate.scoring.yes_no import (
    mme_first_letters,
    mme_words,
    pope_all_rows,
    pope_mean_of_splits,
)
from mmmamba_cli.plugins import load_reference
from mmmamba_cli.recipe.problems import suggest

Rule = Callable[[Sequence[Row], Sequence[str]], UnitScores]

RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        mme_words,
        mme_first_letters,
        pope_all_rows,
        pope_mean_of_splits,
        choice_rows_2026_06,
        choice_rows_2025_08,
        choice_rows_2024_02,
        choice_circular_2026_06,
        choice_circular_2025_08,
        choice_circular_2024_02,
        vqa_words_2025_05,
        vqa_words_2024_01,
        vqa_evalai,
        exact_plain,
        exact_gqa,
    )
}
# A name without a date is an alias of the newest version; results name the version.
NEWEST = {
    "choice_rows": "choice_rows_2026_06",
    "choice_circular": "choice_circular_2026_06",
    "vqa_words": "vqa_words_2025_05",
}


def versioned(name: str) -> str:
    """The name of a scoring rule with the date of its version, if it has versions."""
    return NEWEST.get(name, name)


def find_rule(name: str) -> Rule:
    """A rule of this package by name, or any other as `package.module:function`.

    Raises `DataError` if it is unknown or cannot be imported.
    """
    if versioned(name) in RULES:
        return RULES[versioned(name)]
    if ":" in name:
        try:
            found: Rule = load_reference(name)
        except Exception as error:
            # Importing runs code of another package, which may raise anything.
            raise DataError(
                f"scoring rule {name} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        return found
    names = [*RULES, *NEWEST]
    raise DataError(
        f"no scoring rule is called {name}, known are {', '.join(names)}{suggest(name, names)}"
    )


__all__ = ["NEWEST", "RULES", "Rule", "Tally", "UnitScores", "find_rule", "versioned"]
