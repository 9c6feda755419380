"""A table of results as text with the values that it shows."""

from __future__ import annotations

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

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "rows": list(self.values), "notes": list(self.notes)}
