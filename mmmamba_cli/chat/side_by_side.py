"""Streamed texts side by side in a terminal, written row by row.

A row is final once no column can change it any more; only the row below it is redrawn. Rows that
have scrolled away are never rewritten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells, set_cell_size

GAP = " │ "
# Cells of the narrowest readable column; narrower terminals show the answers one after another.
MIN_WIDTH = 34
CLEAR_ROW = "\r\x1b[K"
# Spaces belong to the word after them, which keeps indentation.
_WORDS = re.compile(r"\s*\S+")


def column_width(terminal: int, columns: int) -> int | None:
    """Cells of each of `columns` columns; None if they would be too narrow to read."""
    # The last cell of a row stays empty: some terminals wrap the line there.
    width = (terminal - 1 - (columns - 1) * cell_len(GAP)) // columns
    return width if width >= MIN_WIDTH else None


def wrap(text: str, width: int) -> list[str]:
    """Wrap text to lines of at most `width` cells; wide characters count as two.

    Appending text changes the last line only, or adds lines.
    """
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        lines += _wrap_paragraph(paragraph, width)
    return lines


def _wrap_paragraph(paragraph: str, width: int) -> list[str]:
    lines = [""]
    for word in _WORDS.findall(paragraph):
        if cell_len(lines[-1]) + cell_len(word) <= width:
            lines[-1] += word
            continue
        pieces = chop_cells(word if lines == [""] else word.lstrip(), width)
        # A word wider than a line starts on the current one: Chinese has no spaces.
        lines = lines + pieces if lines[-1] else lines[:-1] + pieces
    return lines


class SideBySide:
    """Growing texts in columns of `width` cells; methods return the output to write.

    `live` also draws the row that may still change and redraws it after a carriage return.
    """

    def __init__(self, names: Sequence[str], width: int, live: bool = True):
        self._names = tuple(names)
        self._width = width
        self._live = live
        self._texts = [""] * len(names)
        self._lines = [[""] for _ in names]
        self._ended = [False] * len(names)
        self._final = 0

    def heading(self) -> str:
        rule = ["─" * self._width for _ in self._names]
        return f"{self._row(self._names)}\n{'─┼─'.join(rule)}\n"

    def add(self, column: int, text: str) -> str:
        """Append text to a column."""
        self._texts[column] += text
        self._lines[column] = wrap(self._texts[column], self._width)
        return self._redraw()

    def end(self, column: int, note: str = "") -> str:
        """Finish a column; `note` follows in rows of its own."""
        self._ended[column] = True
        self._texts[column] = self._texts[column].rstrip()
        self._lines[column] = wrap(self._texts[column], self._width)
        if note:
            self._lines[column] += wrap(note, self._width)
        return self._redraw()

    def _redraw(self) -> str:
        final = self._num_final()
        rows = [self._row(self._cells(row)) for row in range(self._final, final)]
        self._final = max(self._final, final)
        written = "".join(f"{row}\n" for row in rows)
        if not self._live:
            return written
        rest = "" if all(self._ended) else self._row(self._cells(self._final))
        return f"{CLEAR_ROW}{written}{rest}"

    def _num_final(self) -> int:
        """Number of rows that are final."""
        open_columns = [
            len(lines) - 1
            for lines, ended in zip(self._lines, self._ended, strict=True)
            if not ended
        ]
        return min(open_columns) if open_columns else max(map(len, self._lines))

    def _cells(self, row: int) -> list[str]:
        return [lines[row] if row < len(lines) else "" for lines in self._lines]

    def _row(self, cells: Sequence[str]) -> str:
        return GAP.join(set_cell_size(cell, self._width) for cell in cells).rstrip()
