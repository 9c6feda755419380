"""Spoiled tables of suites and files of answers, through `mmmamba eval`."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_images import KINDS
from judging import Case, numbers, outcome
from mutating import spoil_bytes, spoil_tree
from suite_tables import pope_rows, write_tsv

CaseOf = Callable[[str, int], Case]
CELLS = (
    "",
    "x",
    "-1",
    "[1",
    "[]",
    "['a', 'b']",
    "[{[]: 1}]",
    "[" * 3000 + "]",
    "[" + "-" * 3000 + "1]",
    "[__import__('os').system('touch canary')]",
    "['" + "A" * 200,
    "A" * 100,
    "=" * 100,
    "é" * 100,
    "\0",
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "x" * 400,
    "\x1b[2J",
    "0",
    "99999999999999999999",
    '"',
)


def spoil_rows(rng: random.Random, rows: list[dict[str, Any]], done: list[str]) -> None:
    """One cell, column or row that is not what it should be."""
    kind = rng.choice(("cell", "cell", "cell", "column", "repeat", "picture", "drop"))
    at = rng.randrange(len(rows))
    key = rng.choice(list(rows[at]))
    done.append(f"{kind} {key} of row {at}")
    if kind == "cell":
        rows[at][key] = rng.choice(CELLS)
        done.append(f"{rows[at][key]!r:.40}")
    elif kind == "column":
        for row in rows:
            row[rng.choice((key.upper(), "other"))] = row.pop(key, "")
    elif kind == "repeat":
        rows.append(dict(rows[at]))
    elif kind == "picture":
        content = rng.choice(KINDS)(rng, done)
        rows[at]["image"] = base64.b64encode(content).decode()
    else:
        del rows[at]


def write_table(case: Case, rows: list[dict[str, Any]]) -> Path:
    data = case.home / "data"
    write_tsv(data / "POPE.tsv", rows)
    return data


@pytest.mark.parametrize("number", numbers(40))
def test_tables(case_of: CaseOf, scripted: None, number: int) -> None:
    case = case_of("table", number)
    rows = pope_rows()
    spoil_rows(case.rng, rows, case.done)
    data = write_table(case, rows)
    if number % 4 == 0:
        table = data / "POPE.tsv"
        table.write_bytes(spoil_bytes(case.rng, table.read_bytes(), case.done, near=300))
    out = case.home / "out"
    words = ("--suite", "pope", "--model", "student", "--data", data, "--out", out)
    done = case.command("eval", *words, "--json", "--batch", 1)
    if done.code == 0:
        assert json.loads((out / "student/pope/result.json").read_text())["suite"] == "pope"


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{k: v for k, v in row.items() if k not in ("image", "image_path")} for row in rows]
    return [{**row, "prediction": "Yes"} for row in kept]


@pytest.mark.parametrize("number", numbers(30))
def test_answers(case_of: CaseOf, number: int) -> None:
    case = case_of("answers", number)
    rows = pope_rows()
    data, given = write_table(case, rows), answers(rows)
    form = (".tsv", ".jsonl", ".xlsx")[number % 3]
    file = case.home / f"answers{form}"
    case.done.append(form)
    if form == ".jsonl":
        at = case.rng.randrange(len(given))
        lines = [json.dumps(one) for one in given]
        odd = ("[" * 100_000, "nan", "3", '{"index": []}', '{"index": {"a": 1}}', '{"index": NaN}')
        spoiled = json.dumps(spoil_tree(case.rng, given[at], case.done))
        lines[at] = case.rng.choice((spoiled, spoiled, *odd))
        file.write_text("\n".join(lines))
    elif form == ".tsv":
        spoil_rows(case.rng, given, case.done)
        write_tsv(file, given)
        if number % 2:
            file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done))
    else:
        write_book(file, given)
        file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done))
    words = ("--predictions", file, "--data", data, "--out", case.home / "out", "--json")
    case.command("eval", "--suite", "pope", *words)


def write_book(file: Path, rows: list[dict[str, Any]]) -> None:
    from openpyxl import Workbook

    book = Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append([row[key] for key in rows[0]])
    book.save(file)


@pytest.mark.parametrize("number", numbers(6))
def test_the_same(case_of: CaseOf, number: int) -> None:
    """Other columns, order, endings of lines and kinds of file say the same."""
    case = case_of("same-answers", number)
    rows = pope_rows()
    data, given = write_table(case, rows), answers(rows)
    files = [case.home / "one.tsv", case.home / f"two{('.tsv', '.jsonl', '.xlsx')[number % 3]}"]
    write_tsv(files[0], given)
    case.rng.shuffle(given)
    given = [{"remark": "read by nobody", **one} for one in given]
    if files[1].suffix == ".tsv":
        write_tsv(files[1], given)
        files[1].write_bytes(b"\xef\xbb\xbf" + files[1].read_bytes().replace(b"\n", b"\r\n"))
    elif files[1].suffix == ".jsonl":
        files[1].write_text("\n\n".join(map(json.dumps, given)))
    else:
        write_book(files[1], given)
    words = ("--suite", "pope", "--data", data, "--out", case.home / "out", "--json")
    one, two = (
        outcome(case.command("eval", *words, "--predictions", file))["results"][0] for file in files
    )
    assert one["rules"] == two["rules"] and one["data"] == two["data"]
