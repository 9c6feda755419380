"""`mmmamba eval --predictions`: answers of other programs in files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from ended import Command
from eval_results import by_rule, found
from suite_tables import ScriptedModel, mme_rows, write_tsv


def write_answers(data: Path, folder: Path) -> dict[str, Path]:
    """The same answers to MME in each file type, without pictures, as other kits write them."""
    rows = [{k: v for k, v in row.items() if k != "image"} for row in mme_rows()]
    for row in rows:
        row["prediction"] = row["answer"]
    rows[3]["prediction"] = ""
    files = {"tsv": write_tsv(folder / "scripted_MME.tsv", rows)}
    files["jsonl"] = folder / "scripted_MME.jsonl"
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    book = openpyxl.Workbook()
    assert book.active is not None
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append([value or None for value in row.values()])
    # The first index is the number 0, not an empty cell.
    book.active.cell(2, 1).value = 0
    files["xlsx"] = folder / "scripted_MME.xlsx"
    book.save(files["xlsx"])
    return files


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "xlsx"])
@pytest.mark.parametrize("with_table", [True, False])
def test_predictions_from_a_file(
    mmmamba: Command,
    data: Path,
    tmp_path: Path,
    kind: str,
    with_table: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LMUData", str(data if with_table else tmp_path / "nowhere"))
    file = write_answers(data, tmp_path / "given")[kind]
    said = found(mmmamba, "--suite", "mme", "--predictions", file, "--out", tmp_path)
    (result,) = said["results"]
    # One empty answer in "existence": 75 and 50 instead of 100 and 100.
    assert by_rule(result)["vlmevalkit"] == {"perception": 1925.0, "reasoning": 800.0}
    assert result["rules"][0]["unreadable"] == [{"index": "3", "answer": ""}]
    assert result["model"]["kind"] == "predictions"
    assert result["data"]["file"] == ("MME.tsv" if with_table else file.name)


def test_cached_answers_and_predictions_tsv_can_be_scored_again(
    mmmamba: Command, data: Path, tmp_path: Path, scripted: dict[str, ScriptedModel]
) -> None:
    first = found(
        mmmamba, "--suite", "mme", "--model", "m", "--data", data, "--out", tmp_path / "first"
    )
    (file,) = (tmp_path / "first" / "m" / "mme").glob("predictions-*.jsonl")
    for again in (file, tmp_path / "first" / "m" / "mme" / "predictions.tsv"):
        words = ["--suite", "mme", "--predictions", again, "--data", data, "--out", tmp_path]
        said = found(mmmamba, *words)
        assert said["results"][0]["rules"] == first["results"][0]["rules"]


def test_predictions_file_with_missing_rows(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    lines = [json.dumps({"index": i, "prediction": "Yes"}) for i in range(56) if i not in (7, 9)]
    file.write_text("\n".join(lines))
    words = ["eval", "--suite", "mme", "--predictions", file, "--out", tmp_path]
    done = mmmamba(*words, "--data", data)
    assert done.code == 2
    assert f"{file} lacks 2 of 56 rows: index 7, 9" in done.err
    # Without the table, the file lacks columns.
    done = mmmamba(*words, "--data", tmp_path / "nowhere")
    assert done.code == 2
    assert "MME.tsv, which is not in" in done.err
    assert "--limit N" in mmmamba(*words, "--data", data).err
    assert mmmamba(*words, "--data", data, "--limit", 6).code == 0


def test_answers_to_other_rows_are_named(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    """Rows that a kit could not answer, null or NaN, have empty answers."""
    file = tmp_path / "more.jsonl"
    answers: list[Any] = ["Yes", None, float("nan")] * 20
    lines = [json.dumps({"index": i, "prediction": text}) for i, text in enumerate(answers)]
    file.write_text("\n".join(lines))
    words = ["eval", "--suite", "mme", "--predictions", file, "--out", tmp_path, "--data", data]
    done = mmmamba(*words)
    assert done.code == 0
    assert done.err.splitlines()[0] == (
        f"warning: {file} answers 4 rows that MME.tsv does not have, and they are left out: "
        "index 56, 57, 58, 59"
    )
    assert "37 of 56 answers could not be read" in done.err
    written = (tmp_path / "more" / "mme" / "predictions.tsv").read_text().splitlines()[1:]
    assert len(written) == 56 and not any("nan" in line.lower() for line in written)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "index,prediction\n", "is not one of .tsv, .csv, .jsonl, .xlsx"),
        ("a.csv", "index,prediction\n", "has no predictions"),
        ("a.tsv", "index\tprediction\n0\tYes\n1\n", "row 2 has 1 cells, the heading has 2"),
        ("a.tsv", "index\tprediction\n0\tYes\tno\n", "row 1 has 3 cells, the heading has 2"),
        ("a.csv", "index,prediction\n0,Yes\n1,No, no\n", "row 2 has 3 cells, the heading has 2"),
        (
            "a.tsv",
            'index\tprediction\n0\t"Yes\n1\tNo\n',
            "quoted cell of the last row is never closed",
        ),
        ("a.tsv", "index\tprediction\tprediction\n0\tYes\tNo\n", "more than one column prediction"),
        ("a.tsv", "index\tprediction\n1\tYes\n1.0\tNo\n", "answers index 1 more than once"),
        ("a.tsv", "index\tanswer\n1\tYes\n", "row 1 lacks prediction; it has index, answer"),
        ("a.tsv", "index\tprediction\n", "has no predictions"),
        ("a.jsonl", '{"index": 1, "prediction": "x"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", '{"index": 1, "prediction": "x"}\nx\n', "line 2 is not JSON"),
        ("a.jsonl", '{"index": 1, "prediction": "x"}\n' * 2, "answers index 1 more than once"),
        ("a.jsonl", '{"index": NaN, "prediction": "x"}\n', "row 1 has no index"),
        ("a.tsv", "index\tprediction\n0\tYes\n\tNo\n", "row 2 has no index"),
        ("a.jsonl", '{"index": 1, "prediction": "\\ud800"}\n', "surrogate (U+D800) in prediction"),
        ("a.xlsx", "no workbook", "is not an XLSX workbook"),
        ("missing.tsv", None, "does not exist"),
    ],
)
def test_invalid_predictions_files(
    mmmamba: Command, data: Path, tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    done = mmmamba("eval", *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def number_as(kind: str, number: int) -> Any:
    return float(number) if kind == "xlsx" else f"{number}.0"


@pytest.mark.parametrize("kind", ["tsv", "csv", "xlsx", "jsonl"])
@pytest.mark.parametrize("with_table", [True, False])
def test_decimal_indexes_in_predictions(
    mmmamba: Command, data: Path, tmp_path: Path, kind: str, with_table: bool
) -> None:
    """A data frame with a missing index writes all indexes as decimal numbers."""
    rows = [{k: v for k, v in row.items() if k != "image"} for row in mme_rows()]
    rows = [{**row, "index": number_as(kind, row["index"]), "prediction": "Yes"} for row in rows]
    file = tmp_path / f"answers.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "xlsx":
        write_book(file, [list(rows[0]), *(list(row.values()) for row in rows)])
    else:
        write_tsv(file, rows)
        if kind == "csv":
            file.write_text(file.read_text().replace("\t", ","))
    place = data if with_table else tmp_path / "nowhere"
    words = ["--suite", "mme", "--predictions", file, "--data", place, "--out", tmp_path]
    (result,) = found(mmmamba, *words)["results"]
    assert by_rule(result)["vlmevalkit"] == {"perception": 500.0, "reasoning": 200.0}


def write_book(file: Path, rows: list[list[Any]]) -> None:
    book = openpyxl.Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    book.save(file)


def test_decimal_indexes_in_a_table(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    rows = mme_rows()
    for row in rows:
        row["index"] = f"{row['index']}.0"
        row["image"] = f"{row['image']}.0" if len(row["image"]) < 9 else row["image"]
    write_tsv(data / "MME.tsv", rows)
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"index": row["index"], "prediction": "Yes"}) for row in mme_rows()]
    file.write_text("\n".join(lines))
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    (result,) = found(mmmamba, *words)["results"]
    assert by_rule(result)["vlmevalkit"] == {"perception": 500.0, "reasoning": 200.0}


def test_workbook_rows(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    """Empty cells at the end of a row are ignored; extra cells and repeated columns are errors."""
    file = tmp_path / "answers.xlsx"
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    right = [[row["index"], row["answer"]] for row in mme_rows()]
    right[3] = [3, "=No"]
    write_book(file, [["index", "prediction"], right[0] + [None, None], *right[1:]])
    (result,) = found(mmmamba, *words)["results"]
    # An answer that looks like a formula is read as text.
    assert result["rules"][0]["counts"] == {"right": 56, "wrong": 0, "unreadable": 0}
    answers = (tmp_path / "answers/mme/predictions.tsv").read_text().splitlines()
    assert answers[4].endswith("\t=No")
    for rows, said in (
        ([["index", "prediction"], *right[:2], [2, "Yes", "No"]], "row 3 has 3 cells"),
        ([["index", "prediction", "index"], [1, "Yes", 2]], "more than one column index"),
    ):
        write_book(file, rows)
        done = mmmamba("eval", *words)
        assert (done.code, said in done.err) == (2, True), done.err


def test_partial_suite_is_marked_as_partial(mmmamba: Command, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "part.csv"
    rows = [row for row in mme_rows() if row["category"] in ("existence", "color")]
    file.write_text("index,prediction\n" + "".join(f"{r['index']},{r['answer']}\n" for r in rows))
    words = ["--suite", "mme", "--predictions", file, "--data", data, "--out", tmp_path]
    done = mmmamba("eval", *words, "--limit", 6)
    assert done.code == 0, done.err
    assert "mme: a part, 6 of 56 rows were asked" in done.err
    assert "nothing was asked of count, position, posters" in done.err
    lines = [line.split() for line in done.out.splitlines()]
    shown = next(line for line in lines if line[:2] == ["part.csv", "mme"])
    assert shown[3:5] == ["perception", "400.00"] and "part" in shown
    assert next(line for line in lines if line[:1] == ["reasoning"])[1:] == ["-", "-"]
    written = json.loads((tmp_path / "part/mme/result.json").read_text())
    assert written["rules"][0]["metrics"] == {"perception": 400.0, "reasoning": None}
    assert len(written["data"]["categories_not_asked"]) == 12


def test_workbook_without_openpyxl(
    mmmamba: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    file = write_answers(data, tmp_path)["xlsx"]
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    done = mmmamba("eval", "--suite", "mme", "--predictions", file, "--data", data)
    assert done.code == 2
    assert "pip install 'mmmamba[eval]'" in done.err


@pytest.mark.parametrize("answer", ["Yes\rNo", "\r", "Yes\r", 'say "yes"\r\nno', "a\tb\nc"])
def test_odd_answers_are_read_back(
    answer: str, mmmamba: Command, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    given = {row["index"]: answer if row["index"] == 3 else row["answer"] for row in mme_rows()}
    lines = [json.dumps({"index": i, "prediction": one}) for i, one in given.items()]
    file.write_text("\n".join(lines))
    words = ["--suite", "mme", "--data", data, "--out", tmp_path, "--predictions"]
    first = found(mmmamba, *words, file)["results"][0]
    written = tmp_path / "answers/mme/predictions.tsv"
    with written.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert {row["index"]: row["prediction"] for row in rows} == {
        str(index): one for index, one in given.items()
    }
    assert found(mmmamba, *words, written)["results"][0]["rules"] == first["rules"]
