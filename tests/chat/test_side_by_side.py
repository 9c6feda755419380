"""`SideBySide`: written rows never change."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mmmamba_cli.chat import SideBySide, column_width
from mmmamba_cli.chat.side_by_side import CLEAR_ROW, MIN_WIDTH, wrap

texts = st.text(alphabet="ab c\n\t你好é-", max_size=120)
widths = st.integers(4, 20)


@given(text=texts, width=widths, cut=st.integers(0, 120))
def test_more_text_changes_no_line_but_the_last(text: str, width: int, cut: int) -> None:
    before, after = wrap(text[:cut], width), wrap(text, width)
    assert after[: len(before) - 1] == before[:-1]


@given(text=texts, width=widths)
def test_lines_fit_and_keep_all_words(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert all(cell_len(line) <= width for line in lines)
    kept = "".join("".join(lines).split())
    assert kept == "".join(text.split())


def test_words_stay_whole_and_lines_indented() -> None:
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("a\n  b", 8) == ["a", "  b"]
    assert wrap("你好你好", 6) == ["你好你", "好"]


def test_column_width() -> None:
    assert column_width(80, 2) == 38
    assert column_width(200, 2) == 98
    assert column_width(2 * MIN_WIDTH + 4, 2) == MIN_WIDTH
    assert column_width(2 * MIN_WIDTH + 3, 2) is None
    assert column_width(80, 3) is None


def rows(written: str) -> list[str]:
    """The rows that a terminal shows: the text after the last clear of each row."""
    return [line.rpartition(CLEAR_ROW)[2] for line in written.split("\n")]


@given(left=texts, right=texts, size=st.integers(1, 7))
def test_a_terminal_ends_with_both_texts(left: str, right: str, size: int) -> None:
    table, written = SideBySide(("a", "b"), 10), ""
    for start in range(0, 120, size):
        for column, text in enumerate((left, right)):
            if text[start : start + size]:
                written += table.add(column, text[start : start + size])
    written += table.end(0) + table.end(1)
    shown = [row.ljust(13).split(" │ ", 1) for row in rows(written)]
    for column, text in enumerate((left, right)):
        found = "".join("".join(row[column] for row in shown if len(row) == 2).split())
        assert found == "".join(text.split())


def test_a_finished_column_does_not_hold_back_rows() -> None:
    table = SideBySide(("a", "b"), 10, live=False)
    assert table.heading() == "a          │ b\n───────────┼───────────\n"
    assert table.add(0, "one\ntwo\nthree") == ""
    assert table.end(1) == "one        │\ntwo        │\n"
    assert table.end(0, "(cut)") == "three      │\n(cut)      │\n"
