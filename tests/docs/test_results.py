"""docs/results.md is what the results of the shipped plans give."""

from __future__ import annotations

import difflib

import make_results


def test_the_page_is_up_to_date() -> None:
    stored = make_results.PAGE.read_text(encoding="utf-8")
    page = make_results.page()
    differing = "\n".join(difflib.unified_diff(stored.splitlines(), page.splitlines(), n=0))
    assert not differing, f"run `{make_results.COMMAND}`:\n{differing}"
