"""Comparisons that other programs measured, unit by unit: `comparisons/*.json` of a run.

    {"format": 1, "title": "...", "metric": "...", "unit": "lesson", "command": "...",
     "created": "...", "models": {"linear": [[right, asked], ...]}, "compare": [["linear", "x"]]}

Each pair of numbers is one unit's share; a model's value is 100 times the sum of the first over
the sum of the second. Units are drawn together, so all models must have been asked the same ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.runs.manifest import parse_model

FOLDER = "comparisons"
Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Comparison(BaseModel):
    """The contents of a file: see above."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    title: str
    metric: str
    unit: str
    command: str
    created: str
    models: dict[str, list[tuple[Count, Count]]] = Field(min_length=1)
    compare: list[tuple[str, str]] = []

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        asked = {tuple(of for _, of in units) for units in self.models.values()}
        if any(right > of for units in self.models.values() for right, of in units):
            raise ValueError("a unit has more right than were asked")
        if len(asked) != 1 or not sum(next(iter(asked))):
            raise ValueError("the models were not asked the same units, or none")
        strangers = {name for pair in self.compare for name in pair} - set(self.models)
        if strangers:
            raise ValueError(f"compare names {', '.join(sorted(strangers))}, which models has not")
        return self

    @property
    def units(self) -> int:
        return len(next(iter(self.models.values())))


def read_comparisons(run: Path, remarks: list[str]) -> list[Comparison]:
    """Those of a run, by file name; one that cannot be read is told in `remarks`."""
    found = []
    for file in sorted((run / FOLDER).glob("*.json")):
        try:
            found.append(parse_model(file, Comparison))
        except MmmambaError as error:
            remarks.append(error.message)
    return found
