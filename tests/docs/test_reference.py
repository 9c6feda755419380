"""docs/reference.md equals the generated page."""

from __future__ import annotations

import difflib

import make_reference
import pytest


@pytest.fixture(scope="module")
def page() -> str:
    return make_reference.reference()


def test_the_page_is_up_to_date(page: str) -> None:
    stored = make_reference.PAGE.read_text(encoding="utf-8")
    differing = "\n".join(difflib.unified_diff(stored.splitlines(), page.splitlines(), n=0))
    assert not differing, f"run `{make_reference.COMMAND}`:\n{differing}"


def test_the_page_names_its_generator(page: str) -> None:
    assert f"`{make_reference.COMMAND}`" in page


def test_every_command_and_option_is_listed(page: str) -> None:
    parts = {
        part.partition("\n")[0]: part for part in page.split("\n## ") if part.startswith("mmmamba ")
    }
    listed = dict(make_reference.commands())
    assert {"seed", "distill", "recipe show", "scenes build"} <= listed.keys()
    assert parts.keys() == {f"mmmamba {name}" for name in listed}
    for name, command in listed.items():
        for parameter in command.params:
            for option in parameter.opts if parameter.name != "help" else ():
                word = option if option.startswith("-") else make_reference.argument_word(parameter)
                assert make_reference.cell(f"`{word}") in parts[f"mmmamba {name}"], (name, option)


def test_table_cells_are_escaped() -> None:
    assert make_reference.cell("N|auto of\n <image>") == "N\\|auto of &lt;image>"
