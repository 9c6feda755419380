"""Scores of layers as a file, which grows layer by layer, and the agreement of two rankings.

The file has no times, so that equal measurements give equal files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.checkpoint.config_fields import read_json
from mmmamba_cli.errors import DataError
from mmmamba_cli.runs.manifest import read_json_as

# The folder of a run that scores are written to.
SELECTION = "selection"
KEY_DIGITS = 12
EMBEDDING, LANGUAGE = "embedding", "language"

Number = Annotated[float, Field(allow_inf_nan=False)]


class _JsonModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerScore(_JsonModel):
    """The score of one layer: the larger, the more the teacher's attention is worth there.

    `halves` are the scores over the even and over the odd samples; `error` is the standard error
    over samples.
    """

    layer: int
    stack: Literal["embedding", "language"]
    score: Number
    halves: tuple[Number, Number]
    error: Number


class ScoredRound(_JsonModel):
    """Scores of the layers that are not in `kept`, the layers that are attention already."""

    kept: tuple[int, ...]
    layers: tuple[LayerScore, ...]


class LayerScores(_JsonModel):
    """The contents of a scores file.

    `inputs` are all that a score depends on. `embedding_ratio` is the number of columns that the
    embedding stack sees for each column of the language stack, over the samples. Without re-scoring
    there is one round, with nothing kept.
    """

    format: Literal[1] = 1
    method: str
    unit: str
    num_layers: int
    embedding_ratio: Number
    inputs: dict[str, Any]
    rounds: tuple[ScoredRound, ...] = ()

    def round_of(self, kept: Collection[int]) -> ScoredRound:
        """The round in which exactly `kept` were attention; an empty one if there is none."""
        wanted = tuple(sorted(kept))
        empty = ScoredRound(kept=wanted, layers=())
        return next((one for one in self.rounds if one.kept == wanted), empty)

    def with_score(self, kept: Collection[int], score: LayerScore) -> LayerScores:
        """A copy with one more score in the round of `kept`."""
        old = self.round_of(kept)
        new = old.model_copy(update={"layers": (*old.layers, score)})
        rounds = [one for one in self.rounds if one.kept != old.kept]
        return self.model_copy(update={"rounds": (*rounds, new)})


def settings_key(inputs: dict[str, Any]) -> str:
    """A short hash of all that a score depends on."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def write_layer_scores(file: Path, scores: LayerScores) -> None:
    """Write a scores file atomically; the folder is made if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    value = scores.model_dump(mode="json")
    atomic_write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_layer_scores(file: Path) -> LayerScores:
    """Read a scores file. Raises `RunError` that names the file and the first problem."""
    return read_json_as(file, LayerScores)


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_given_scores(file: Path, stacks: Sequence[str]) -> tuple[tuple[LayerScore, ...], float]:
    """Scores of the user's own, and the columns' ratio: a scores file, or `{"scores": [...]}`.

    A scores file gives its first round, in which nothing was kept. `stacks` has the stack of each
    layer of the model.

    Raises:
        DataError: no such file, another number of layers than the model's, or no numbers.
    """
    hint = 'expected {"scores": [...]} with one number for each layer, or a file of --select'
    try:
        value = read_json(file)
    except FileNotFoundError:
        raise DataError(
            f"{file}: no such file", "give the path of a scores file, as in file:scores.json"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}", hint) from error
    if isinstance(value, dict) and "rounds" in value:
        found = read_layer_scores(file)
        layers = found.round_of(()).layers
        _check_count(file, len(layers), len(stacks), hint)
        return tuple(sorted(layers, key=lambda one: one.layer)), found.embedding_ratio
    given = value.get("scores") if isinstance(value, dict) else None
    if not isinstance(given, list) or not all(_is_number(one) for one in given):
        raise DataError(f"{file} has no list of numbers called scores", hint)
    _check_count(file, len(given), len(stacks), hint)
    scores = [
        LayerScore.model_validate(
            {"layer": i, "stack": stack, "score": one, "halves": (one, one), "error": 0.0}
        )
        for i, (one, stack) in enumerate(zip(given, stacks, strict=True))
    ]
    return tuple(scores), 1.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_count(file: Path, found: int, expected: int, hint: str) -> None:
    if found != expected:
        raise DataError(f"{file} has scores of {found} layers, the model has {expected}", hint)


@dataclass(frozen=True)
class Agreement:
    """How far the rankings by both halves of the data agree; None with fewer than two layers."""

    spearman: float | None

    @property
    def is_low(self) -> bool:
        return self.spearman is not None and self.spearman < MIN_SPEARMAN


# Below this rank correlation of both halves the ranking is mostly chance.
MIN_SPEARMAN = 0.8


def half_agreement(scores: Sequence[LayerScore]) -> Agreement:
    """The rank correlation of the scores by both halves of the data."""
    return Agreement(spearman(*([one.halves[half] for one in scores] for half in (0, 1))))


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation; equal values share their mean rank.

    None for fewer than two values, or if all values of a side are equal.
    """
    left, right = _ranks(one), _ranks(other)
    if len(left) < 2:
        return None
    middle = (len(left) - 1) / 2
    a, b = ([rank - middle for rank in ranks] for ranks in (left, right))
    spread = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 0; equal values get the mean of their ranks."""
    ordered = sorted(values)
    places = {value: ordered.index(value) + (ordered.count(value) - 1) / 2 for value in set(values)}
    return [places[value] for value in values]
