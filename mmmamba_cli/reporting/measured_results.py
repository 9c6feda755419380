"""Files of `mmmamba report --results`: measured scores or costs that lead a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.result import Result
from mmmamba_cli.evaluate.score_retention import Retention
from mmmamba_cli.profiling import Profile, read_profile
from mmmamba_cli.runs.manifest import read_json_as


class MeasuredScores(BaseModel):
    """What `mmmamba eval --teacher --json` prints, with the conditions of the measurement.

        {"format": 1, "command": "...", "date": "2026-11-29", "device": "...",
         "results": [...], "retention": [...]}

    Everything but `results` may be left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    what: str | None = None
    command: str | None = None
    date: str | None = None
    device: str | None = None
    results: tuple[Result, ...] = Field(min_length=1)
    retention: tuple[Retention, ...] = ()
    # Printed by `--compare`; not shown on a page.
    published: Any = None


@dataclass(frozen=True)
class MeasuredResults:
    """The contents of all files, with their names."""

    scores: tuple[tuple[str, MeasuredScores], ...] = ()
    profiles: tuple[tuple[str, Profile], ...] = ()


def read_measured_results(files: Sequence[Path]) -> MeasuredResults:
    """Read scores and profiles.

    Raises:
        RunError: if a file is missing, damaged, or neither of both.
    """
    scores: list[tuple[str, MeasuredScores]] = []
    profiles: list[tuple[str, Profile]] = []
    for file in files:
        keys = _keys(file)
        if "measurements" in keys:
            profiles.append((file.name, read_profile(file)))
        elif "results" in keys:
            scores.append((file.name, read_json_as(file, MeasuredScores)))
        else:
            raise RunError(
                f"{file} has neither scores nor a profile",
                "give what mmmamba eval --json prints, or profile.json of mmmamba profile",
            )
    return MeasuredResults(tuple(scores), tuple(profiles))


def _keys(file: Path) -> set[str]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}", "check --results") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is not valid JSON", "check --results") from error
    return set(value) if isinstance(value, dict) else set()
