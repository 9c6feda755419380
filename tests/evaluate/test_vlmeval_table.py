"""Tables in VLMEvalKit's layout: cells, pictures, limits and error messages."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from suite_tables import mme_rows, picture, pope_rows, write_tsv

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import EvalOptions, find_suite, open_suite
from mmmamba_cli.evaluate.images import pictures_of
from mmmamba_cli.evaluate.rows import Row, limit_rows
from mmmamba_cli.evaluate.scoring.yes_no import PERCEPTION, REASONING
from mmmamba_cli.evaluate.vlmeval_table import VLMEvalTable

COLUMNS = ("index", "question", "answer", "category")


def opened(folder: Path, suite: str = "mme", **options: Any) -> tuple[VLMEvalTable, list[Row]]:
    return open_suite(find_suite(suite), EvalOptions(data=folder, **options))


def complaint(folder: Path, rows: list[Any], suite: str = "mme") -> str:
    """The error message of a table, one line."""
    write_tsv(folder / f"{find_suite(suite).dataset}.tsv", rows)
    with pytest.raises(DataError) as caught:
        opened(folder, suite)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_are_shared_by_reference_and_read_lazily(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "MME.tsv", mme_rows(pairs=3))
    table = VLMEvalTable(file, COLUMNS)
    assert len(table.cells) == 84
    (own,) = pictures_of(table, table.cells[4], "MME")
    (shared,) = pictures_of(table, table.cells[5], "MME")
    assert own.source() == shared.source() == base64.b64decode(picture(4, (130, 40)))
    assert shared.size() == (130, 40)
    assert shared.open().getpixel((0, 0)) == (4, 0, 7)
    assert "image" not in table.cells[0]


def test_cells_with_tabs_quotes_and_line_ends(tmp_path: Path) -> None:
    rows = mme_rows()
    odd = 'Is "this"\ta\nquestion\u2028 with everything? 这是什么'
    rows[0]["question"] = odd
    table = VLMEvalTable(write_tsv(tmp_path / "MME.tsv", rows), COLUMNS)
    assert table.cells[0]["question"] == odd
    for place in (0, 2):
        (one,) = pictures_of(table, table.cells[place], "MME")
        assert one.open().getpixel((0, 0)) == (place, 0, 7)


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "MME.tsv", mme_rows())
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    table, rows = opened(tmp_path)
    assert (len(rows), table.columns[0]) == (56, "index")
    assert rows[1].category == "existence"
    (one,) = pictures_of(table, table.cells[2], "MME")
    assert one.open().getpixel((0, 0)) == (2, 0, 7)


def test_several_pictures_in_a_cell(tmp_path: Path) -> None:
    rows = [
        {
            "index": 1,
            "image": str([picture(1, (60, 40)), picture(2, (50, 30))]),
            "question": "What differs between <image 1> and <image 2>?",
            "answer": "A",
            "A": "x",
            "B": "y",
            "C": "",
            "D": "",
            "split": "validation",
        },
        {"index": 2, "image": "1", "question": "?", "answer": "3", "split": "dev"},
    ]
    write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows)
    table, found = opened(tmp_path, "mmmu")
    assert [row.index for row in found] == ["1"]
    assert found[0].options == {"A": "x", "B": "y"}
    first, second = pictures_of(table, table.cells[0], "MMMU_DEV_VAL", enlarge=2)
    assert (first.size(), second.size()) == ((120, 80), (50, 30))
    assert (first.open().size, second.open().size) == ((120, 80), (50, 30))
    assert second.open().getpixel((0, 0)) == (2, 0, 7)


def test_picture_files(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "image"} for row in mme_rows()]
    write_tsv(tmp_path / "MME.tsv", rows)
    table, _ = opened(tmp_path)
    with pytest.raises(DataError, match=r"images/existence/0.png of row 0 is in none of"):
        pictures_of(table, table.cells[0], "MME")
    for place in ("images/existence/0.png", "images/MME/images/existence/1.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / place)
    for place in (0, 2):
        (one,) = pictures_of(table, table.cells[place], "MME")
        assert one.size() == (8, 6)


def test_limit_keeps_pairs_whole(tmp_path: Path) -> None:
    rows = mme_rows(pairs=1)
    # The second questions of all pictures come after the first ones.
    write_tsv(tmp_path / "MME.tsv", rows[::2] + rows[1::2])
    _, found = opened(tmp_path, limit=5)
    assert [row.index for row in found] == ["0", "2", "1", "3"]
    _, least = opened(tmp_path, limit=1)
    assert [row.index for row in least] == ["0", "1"]
    assert len(limit_rows(found, find_suite("mme"), None)) == 4


def test_limit_is_spread_over_categories(tmp_path: Path) -> None:
    write_tsv(tmp_path / "MME.tsv", mme_rows(pairs=3))
    _, found = opened(tmp_path, limit=28)
    assert Counter(row.category for row in found) == dict.fromkeys((*PERCEPTION, *REASONING), 2)
    _, found = opened(tmp_path, limit=16)
    assert list(dict.fromkeys(row.category for row in found)) == list(PERCEPTION[:8])
    assert opened(tmp_path, limit=16)[1] == found
    write_tsv(tmp_path / "POPE.tsv", pope_rows())
    # Rows about one picture are not scored together: each split gets its share.
    for limit, each in ((3, [1, 1, 1]), (7, [3, 2, 2]), (9, [3, 3, 3])):
        _, found = opened(tmp_path, "pope", limit=limit)
        assert [row.index for row in found] == sorted((row.index for row in found), key=int)
        assert list(Counter(row.category for row in found).values()) == each


def test_missing_table_names_the_places_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = find_suite("pope")
    with pytest.raises(DataError) as caught:
        open_suite(suite, EvalOptions(data=tmp_path))
    said = str(caught.value)
    for part in (f"POPE.tsv, which is not in {tmp_path}", "--data DIR, else $LMUData, else ~/LMU"):
        assert part in said
    assert "columns index, question, answer, category and image" in said
    write_tsv(tmp_path / "there" / "POPE.tsv", pope_rows())
    monkeypatch.setenv("LMUData", str(tmp_path / "there"))
    assert len(open_suite(suite, EvalOptions())[1]) == 12
    monkeypatch.delenv("LMUData")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").rename(tmp_path / "LMUData")
    assert len(open_suite(suite, EvalOptions())[1]) == 12


def test_missing_columns(tmp_path: Path) -> None:
    bare = [{"index": row["index"], "question": "?"} for row in mme_rows()]
    said = complaint(tmp_path, bare)
    assert "lacks the columns answer, category, image (or image_path)" in said
    assert "it has index, question" in said


def without(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**row, **changes}


BROKEN: list[tuple[Callable[[list[Any]], None], str]] = [
    (lambda rows: rows[3].update(image="3"), r"3 -> 3"),
    (lambda rows: rows[3].update(image="999"), r"3 -> 999"),
    (lambda rows: rows[5].update(image="3"), r"5 -> 3"),
    (lambda rows: rows[7].update(index=2), r"more than one row of index 2 "),
    (lambda rows: rows.pop(3), r"two questions in its category, not so .* 2 \(1\)"),
    (lambda rows: rows[4].update(category="OCR"), r"4 \(1\), 5 \(1\)"),
    (
        lambda rows: rows.insert(0, without(rows[0], index=900)),
        r"not so the rows of index 900\+0\+1 \(3\)",
    ),
    (lambda rows: rows[9].update(answer="perhaps"), r"neither Yes nor No in the rows of index 9 "),
    (lambda rows: rows.clear() or rows.append(without(mme_rows()[0], index="")), r"\(1\)"),
]


@pytest.mark.parametrize(("damage", "named"), BROKEN)
def test_damaged_rows_are_named(
    tmp_path: Path, damage: Callable[[list[Any]], None], named: str
) -> None:
    import re

    rows = mme_rows()
    damage(rows)
    said = complaint(tmp_path, rows)
    assert str(tmp_path / "MME.tsv") in said
    assert re.search(named, said), said


def test_bad_base64_names_the_row(tmp_path: Path) -> None:
    rows = mme_rows()
    rows[0]["image"] = "!" + rows[0]["image"]
    rows[2]["image"] = base64.b64encode(b"no picture at all" * 9).decode()
    write_tsv(tmp_path / "MME.tsv", rows)
    table, _ = opened(tmp_path)
    for place in (0, 1):
        (one,) = pictures_of(table, table.cells[place], "MME")
        with pytest.raises(DataError, match=f"row {place}: the image is not valid base64"):
            one.size()
    (one,) = pictures_of(table, table.cells[2], "MME")
    with pytest.raises(DataError, match=r"image of row 2 .*not in an image format"):
        one.size()


def test_file_that_is_not_a_table(tmp_path: Path) -> None:
    file = tmp_path / "MME.tsv"
    for content, said in (
        (b"", "it has none"),
        (b"index\timage\tquestion\tanswer\tcategory\n", "has no rows"),
        (b"index\timage\tquestion\tanswer\tcategory\n1\t2\n", "row 1 has 2 cells"),
        (b"index\timage\tquestion\tanswer\tcategory\n\xff\t2\n", "line 2 is not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=said):
            opened(tmp_path)


def test_circular_turns_by_index(tmp_path: Path) -> None:
    base = {"image": picture(1), "question": "?", "answer": "A", "A": "x", "B": "y"}
    write_tsv(
        tmp_path / "MMBench_DEV_EN.tsv",
        [{**base, "index": i} for i in (7, 8, 1_000_007, 2_000_007)],
    )
    _, rows = opened(tmp_path, "mmbench")
    assert [row.unit for row in rows] == ["7", "8", "7", "7"]
    _, first = opened(tmp_path, "mmbench", limit=3)
    assert [row.index for row in first] == ["7", "1000007", "2000007"]
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", [{**base, "index": "seven"}])
    with pytest.raises(DataError, match="index seven is no number"):
        opened(tmp_path, "mmbench")
