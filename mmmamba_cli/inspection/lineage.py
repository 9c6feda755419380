"""A run as its folders tell it: products, what was learned, what was scored; nothing is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.distill import METRICS, read_metrics
from mmmamba_cli.evaluate.result import Result, find_results
from mmmamba_cli.runs import Manifest, Run, Teacher

EVALS = "evals"
HELD_OUT = "held_out/loss"


@dataclass(frozen=True)
class SuiteScore:
    """A suite by one rule; `partial` says that not all rows were asked."""

    suite: str
    rule: str
    metric: str
    value: float
    partial: bool


@dataclass(frozen=True)
class ProductSummary:
    """A product and what lies in its folder. `held_out` are the losses of the stage it ends."""

    manifest: Manifest
    folder: Path
    embedding_layers: int
    nbytes: int
    held_out: tuple[float, ...]
    scores: tuple[SuiteScore, ...]

    @property
    def above(self) -> str | None:
        """The product it was made from, if it was made from one."""
        return next((p.name for p in self.manifest.parents if p.role == "student"), None)


@dataclass(frozen=True)
class Lineage:
    """A run: its teacher if it has one, its products, oldest first, and the current one's name."""

    folder: Path
    teacher: Teacher | None
    teacher_scores: tuple[SuiteScore, ...]
    current: str
    products: Mapping[str, ProductSummary]
    # Results that are not among the scores, a sentence each.
    left_out: tuple[str, ...] = ()


def read_lineage(run: Run) -> Lineage:
    """Everything of a run that can be told without its weights. Raises `RunError`."""
    record = run.record
    evaluated = find_results(run.folder / EVALS)
    scores = list(_scores(evaluated.results.values()))
    teacher = record.teacher

    def of(content_hash: str) -> tuple[SuiteScore, ...]:
        return tuple(score for found, score in scores if found == content_hash)

    products = {
        name: ProductSummary(
            manifest,
            run.product_folder(name),
            _embedding_layers(run.product_folder(name)),
            _folder_bytes(run.product_folder(name)),
            tuple(_held_out(run.product_folder(name) / METRICS)),
            of(manifest.content_hash),
        )
        for name, manifest in run.products().items()
    }
    return Lineage(
        run.folder,
        teacher,
        () if teacher is None else of(teacher.content_hash),
        record.current,
        products,
        evaluated.left_out,
    )


def _scores(results: Iterable[Result]) -> Iterator[tuple[str, SuiteScore]]:
    """The content hash of a model, and each of its scores that has a value."""
    for result in results:
        for part in result.rules:
            value = part.metrics[part.metric]
            if value is not None:
                score = SuiteScore(result.title, part.rule, part.metric, value, result.data.partial)
                yield result.model.content_hash, score


def _held_out(file: Path) -> Iterator[float]:
    for row in read_metrics(file):
        value = row.get(HELD_OUT)
        if isinstance(value, int | float):
            yield float(value)
        elif value is not None:
            # JSON has no NaN: a loss that was none is written as a word.
            yield math.nan


def _embedding_layers(folder: Path) -> int:
    """Layers of the embedding stack; 0 if it has none, or nobody can tell."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        return int((config.get("embedding_stack") or {}).get("num_layers", 0))
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
