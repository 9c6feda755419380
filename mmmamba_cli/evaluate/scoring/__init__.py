"""Scoring rules: pure functions from rows and answers to a tally. A suite names those it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.choices import choice_circular, choice_rows
from mmmamba_cli.evaluate.scoring.short import exact_gqa, exact_plain, vqa_evalai, vqa_words
from mmmamba_cli.evaluate.scoring.tally import Tally
from mmmamba_cli.evaluate.scoring.yes_no import (
    mme_first_letters,
    mme_words,
    pope_all_rows,
    pope_mean_of_splits,
)
from mmmamba_cli.plugins import load_reference

Rule = Callable[[Sequence[Row], Sequence[str]], Tally]

RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        mme_words,
        mme_first_letters,
        pope_all_rows,
        pope_mean_of_splits,
        choice_rows,
        choice_circular,
        vqa_words,
        vqa_evalai,
        exact_plain,
        exact_gqa,
    )
}


def find_rule(name: str) -> Rule:
    """A rule of ours by its name, or another's as `package.module:function`.

    Raises `DataError` if there is none.
    """
    if name in RULES:
        return RULES[name]
    if ":" in name:
        try:
            found: Rule = load_reference(name)
        except (ImportError, AttributeError) as error:
            raise DataError(f"scoring rule {name} cannot be imported: {error}") from error
        return found
    raise DataError(f"no scoring rule is called {name}, known are {', '.join(RULES)}")


__all__ = ["RULES", "Rule", "Tally", "find_rule"]
