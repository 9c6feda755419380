"""File names in any script on streams of any encoding: escaped if necessary, JSON stays valid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
from case import Case, numbers, outcome
from materials import Materials

CaseOf = Callable[[str, int], Case]
ENCODINGS = (
    "ascii",
    "cp1252",
    "cp437",
    "latin-1",
    "koi8-r",
    "shift_jis",
    "gbk",
    "big5",
    "utf-16",
    "utf-8",
)
# Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, Chinese, Korean, symbols, emoji,
# combining marks, unusual spaces; no path or line separators.
RANGES = (
    (0x61, 0x7A),
    (0xC0, 0x17F),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x905, 0x939),
    (0xE01, 0xE30),
    (0x4E00, 0x4FFF),
    (0xAC00, 0xADFF),
    (0x2190, 0x2BFF),
    (0x1F600, 0x1F64F),
    (0x300, 0x36F),
    (0x2000, 0x200B),
    (0xDC80, 0xDCFF),
)


def name(case: Case) -> str:
    """A valid file name with letters of several scripts."""
    letters = (chr(case.rng.randint(*case.rng.choice(RANGES))) for _ in range(12))
    found = "n" + "".join(letters)
    case.done.append(f"name {found!a}")
    return found


@pytest.mark.parametrize("number", numbers(40))
def test_names(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("encoding", number)
    encoding = ENCODINGS[number % len(ENCODINGS)]
    case.done.append(f"streams in {encoding}")
    called = name(case)
    run = case.copy(materials.run, called)
    commands: tuple[tuple[object, ...], ...] = (
        ("status", "--run", run),
        ("inspect", "--run", run),
        ("status", "--run", f"{run}-gone"),
        ("inspect", f"{run}-gone"),
        ("recipe", "show", f"{run}-gone"),
        ("data", "check", f"{run}.jsonl", "--model", materials.hovle),
    )
    words = commands[number // len(ENCODINGS) % 2 + 2 * case.rng.randrange(3)]
    for form in ((), ("--json",)):
        done = case.command(*words, *form, encoding=encoding)
        if form and done.out:
            assert called in json.dumps(outcome(done), ensure_ascii=False)


@pytest.mark.parametrize("number", numbers(20))
def test_pictures_that_are_not_there(case_of: CaseOf, materials: Materials, number: int) -> None:
    case = case_of("encoding-data", number)
    encoding = ENCODINGS[number % len(ENCODINGS)]
    # A lone surrogate cannot be encoded as UTF-8.
    called = name(case).encode("utf-8", "replace").decode()
    turns = [{"from": "human", "value": f"<image>\n{called}"}, {"from": "gpt", "value": called}]
    file = case.home / "data.jsonl"
    line = json.dumps({"image": f"{called}.png", "conversations": turns}, ensure_ascii=False)
    file.write_text(line + "\n", encoding="utf-8")
    words = ("data", "check", file, "--model", materials.hovle, "--max-bad-share", 1)
    for form in ((), ("--json",)):
        done = case.command(*words, *form, encoding=encoding)
        if form:
            assert called in json.dumps(outcome(done), ensure_ascii=False)
    shutil.rmtree(case.home / "tmp")
    (case.home / "tmp").mkdir()
