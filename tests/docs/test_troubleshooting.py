"""docs/troubleshooting.md quotes messages of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
# Stands for a filled-in part of a message.
GAP = "…"
QUOTED = re.compile(r"^### (.+)$", re.MULTILINE)


def plain(text: str) -> str:
    return " ".join(text.split())


def messages(source: str) -> Iterator[str]:
    """The string literals of a module except docstrings, with `…` for filled-in parts."""
    tree = ast.parse(source)
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            # Format specifications are strings inside a string.
            left_out |= {id(inner) for inner in ast.walk(node) if inner is not node}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else GAP for p in node.values)
            yield plain("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield plain(node.value)


def headings() -> list[str]:
    return QUOTED.findall(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def known() -> list[str]:
    files = [*(ROOT / "mmmamba_cli").rglob("*.py"), *(ROOT / "evals").rglob("*.py")]
    return [m for file in files for m in messages(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("heading", headings())
def test_the_message_exists_in_the_code(heading: str, known: list[str]) -> None:
    assert heading[:1] == heading[-1:] == "`"
    quoted = heading[1:-1]
    # Long enough to identify the message.
    assert len(re.sub(r"\W", "", quoted)) >= 6
    assert any(quoted in message for message in known), f"no message of the code has: {quoted}"


def test_every_message_is_quoted_once() -> None:
    assert len(headings()) > 50
    assert len(set(headings())) == len(headings())


def test_every_message_is_explained() -> None:
    parts = QUOTED.split(PAGE.read_text(encoding="utf-8"))[1:]
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        assert len(text.partition("\n## ")[0].split()) >= 4, heading


def test_messages_of_a_module() -> None:
    source = '''
"""Doc."""
def f(x):
    """No message."""
    raise E(f"{x} is not "
            f"there: {x:>3}", "do it")
'''
    assert list(messages(source)) == [f"{GAP} is not there: {GAP}", "do it"]
