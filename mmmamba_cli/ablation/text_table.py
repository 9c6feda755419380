"""A table of results as text with the values that it shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextTable:
    """A table as text, and the values it shows."""

    title: str
    heading: tuple[str, ...]
    rows: list[tuple[object, ...]]
    notes: tuple[str, ...]
    values: tuple[dict[str, Any], ...]

    @property
    def numeric_columns(self) -> list[str]:
        """Names of the columns whose cells begin with a number, or are empty."""
        columns = zip(*self.rows, strict=True)
        return [
            name
            for name, cells in zip(self.heading, columns, strict=True)
            if all(cell is None or re.match(r"[+-]?\d", str(cell)) for cell in cells)
        ]

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "rows": list(self.values), "notes": list(self.notes)}
