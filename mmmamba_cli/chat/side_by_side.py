"""Several texts side by side while they grow, row by row, as a terminal can show them.

A row is final as soon as no column can change it any more; only the one row below is drawn again
and again. So nothing that scrolled away is ever touched, however long the answers are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells, set_cell_size

GAP = " │ "
# Columns narrower than this cannot be read; there the answers come one after the other.
MIN_WIDTH = 34
CLEAR_ROW = "\r\x1b[K"
# Spaces are kept with the word behind them, so that indented lines stay indented.
_WORDS = re.compile(r"\s*\S+")


def column_width(terminal: int, columns: int) -> int | None:
    """Cells of each of `columns` columns, None where they would be too narrow to read."""
    # The last cell of a row stays empty: some terminals break the line there.
    width = (terminal - 1 - (columns - 1) * cell_len(GAP)) // columns
    return width if width >= MIN_WIDTH else None


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells; wide characters count two. More text changes the last only,
    or goes on below it.
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
        # A word that is wider than a line begins where there is room: Chinese has no spaces.
        lines = lines + pieces if lines[-1] else lines[:-1] + pieces
    return lines


class SideBySide:
    """Texts that grow in columns of `width` cells. What its methods return is to be written as is.

    `live`: whether the row that still changes is drawn too, with a carriage return, as a terminal
    wants it.
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
        """More of one column."""
        self._texts[column] += text
        self._lines[column] = wrap(self._texts[column], self._width)
        return self._redraw()

    def end(self, column: int, note: str = "") -> str:
        """No more of this column; `note` stands in a row of its own below."""
        self._ended[column] = True
        self._texts[column] = self._texts[column].rstrip()
        self._lines[column] = wrap(self._texts[column], self._width)
        if note:
            self._lines[column] += wrap(note, self._width)
        return self._redraw()

    def _redraw(self) -> str:
        ready = self._ready()
        rows = [self._row(self._at(row)) for row in range(self._final, ready)]
        self._final = max(self._final, ready)
        written = "".join(f"{row}\n" for row in rows)
        if not self._live:
            return written
        rest = "" if all(self._ended) else self._row(self._at(self._final))
        return f"{CLEAR_ROW}{written}{rest}"

    def _ready(self) -> int:
        """Rows that nothing changes any more."""
        open_columns = [
            len(lines) - 1
            for lines, ended in zip(self._lines, self._ended, strict=True)
            if not ended
        ]
        return min(open_columns) if open_columns else max(map(len, self._lines))

    def _at(self, row: int) -> list[str]:
        return [lines[row] if row < len(lines) else "" for lines in self._lines]

    def _row(self, cells: Sequence[str]) -> str:
        return GAP.join(set_cell_size(cell, self._width) for cell in cells).rstrip()
