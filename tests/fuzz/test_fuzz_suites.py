"""Corrupted suite tables and answer files in `mmmamba eval`."""

from __future__ import annotations

import base64
import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_images import KINDS
from case import Case, numbers, outcome
from mutations import spoil_bytes, spoil_tree
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
    """Change one cell, column or row."""
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
    form = (".tsv", ".jsonl", ".xlsx", ".csv")[number % 4]
    file = case.home / f"answers{form}"
    case.done.append(form)
    if form == ".jsonl":
        at = case.rng.randrange(len(given))
        lines = [json.dumps(one) for one in given]
        odd = ("[" * 100_000, "nan", "3", '{"index": []}', '{"index": {"a": 1}}', '{"index": NaN}')
        spoiled = json.dumps(spoil_tree(case.rng, given[at], case.done))
        lines[at] = case.rng.choice((spoiled, spoiled, *odd))
        file.write_text("\n".join(lines))
    elif form in SEPARATORS:
        spoil_rows(case.rng, given, case.done)
        heading = list(dict.fromkeys(key for row in given for key in row))
        cells = [[row.get(key, "") for key in heading] for row in given]
        write_separated(file, [heading, *cells])
        if number % 2:
            file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done))
    else:
        write_book(file, given)
        file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done))
    words = ("--predictions", file, "--data", data, "--out", case.home / "out", "--json")
    case.command("eval", "--suite", "pope", *words)


SEPARATORS = {".tsv": "\t", ".csv": ","}


def write_separated(file: Path, rows: list[list[Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, delimiter=SEPARATORS[file.suffix]).writerows(rows)


def bend(rng: random.Random, rows: list[list[Any]], done: list[str]) -> str | None:
    """Change the shape of a table or its heading; return the row the error must name, or None.

    Older versions silently misread each of these.
    """
    at = rng.randrange(1, len(rows))
    kind = rng.choice(("cut", "more", "twice", "decimals", "blank", "order"))
    done.append(f"{kind} at row {at}")
    if kind == "cut":
        del rows[at][rng.randrange(2, len(rows[at])) :]
        return f"row {at} has"
    if kind == "more":
        rows[at] += ["No"] * rng.randrange(1, 4)
        return f"row {at} has"
    if kind == "twice":
        for row in rows:
            row.append(row[rng.choice((0, -1))])
        rows[0][-1] = rng.choice(("index", "prediction", " prediction "))
        return "more than one column"
    if kind == "decimals":
        for row in rows[1:]:
            row[0] = f"{row[0]}.{'0' * rng.randrange(1, 4)}"
    elif kind == "blank":
        rows.insert(at, [])
    else:
        places = list(range(len(rows[0])))
        rng.shuffle(places)
        rows[:] = [[row[place] for place in places] for row in rows]
    return None


@pytest.mark.parametrize("number", numbers(36))
def test_shapes_of_tables_of_answers(case_of: CaseOf, number: int) -> None:
    case = case_of("shape", number)
    rows = pope_rows()
    data, given = write_table(case, rows), answers(rows)
    table = [list(given[0]), *(list(row.values()) for row in given)]
    named = bend(case.rng, table, case.done)
    file = case.home / f"answers{('.tsv', '.csv')[number % 2]}"
    write_separated(file, table)
    if case.rng.random() < 0.3:
        case.done.append("byte order mark")
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    words = ("--suite", "pope", "--data", data, "--out", case.home / "out", "--json")
    done = case.command("eval", *words, "--predictions", file)
    if named is not None:
        assert done.code == 2 and named in done.err, case.reproduction(words)
        return
    (result,) = outcome(done)["results"]
    assert result["data"]["used"] == len(rows)
    assert result["rules"][1]["metrics"]["accuracy"] == 50.0


def write_book(file: Path, rows: list[dict[str, Any]]) -> None:
    from openpyxl import Workbook

    book = Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append([row[key] for key in rows[0]])
    book.save(file)


@pytest.mark.parametrize("number", numbers(6))
def test_the_same(case_of: CaseOf, number: int) -> None:
    """Other columns, column order, line endings and file formats give the same table."""
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
