"""docs/results.md is what the results of the shipped plans give."""

from __future__ import annotations

import difflib
import re

import make_results
import pytest

from mmmamba_cli.ablation.results_page import SAY


@pytest.fixture(scope="module")
def page() -> str:
    return make_results.page()


def test_the_page_is_up_to_date(page: str) -> None:
    stored = make_results.PAGE.read_text(encoding="utf-8")
    differing = "\n".join(difflib.unified_diff(stored.splitlines(), page.splitlines(), n=0))
    assert not differing, f"run `{make_results.COMMAND}`:\n{differing}"


def test_numbers_of_the_texts_are_in_the_tables_above_them(page: str) -> None:
    checked = 0
    for plan, conclusions in make_results.conclusions().items():
        section = page.partition(f"\n## {plan}\n")[2].partition("\n## ")[0]
        for text in conclusions.texts.values():
            before = section.partition(text)[0].rpartition(SAY)[0]
            tables = before.rpartition(SAY)[2]
            assert tables, f"{plan} has no table for: {text[:60]}"
            missing = set(numbers(text)) - set(numbers(tables))
            assert not missing, f"{missing} is in no table of {plan} above: {text[:60]}"
            checked += len(numbers(text))
    assert checked > 30


def numbers(text: str) -> list[str]:
    """Numbers with a decimal point, without their sign."""
    return re.findall(r"\d+\.\d+", text)
