"""Lineage of a run from its files: products, held-out losses and scores. No model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmmamba_cli.distill import METRICS, read_metrics
from mmmamba_cli.evaluate.result import Result
from mmmamba_cli.evaluate.run_results import matching_value, read_run_results
from mmmamba_cli.runs import Manifest, Run, Teacher

if TYPE_CHECKING:
    from mmmamba_cli.export import CardScore

HELD_OUT_LOSS = "held_out/loss"


@dataclass(frozen=True)
class SuiteScore:
    """Score of a suite by one rule; `partial` if only a part of the rows was asked."""

    suite: str
    rule: str
    metric: str
    value: float
    partial: bool


@dataclass(frozen=True)
class ProductSummary:
    """A product and its folder. `held_out` are the held-out losses of the stage that made it."""

    manifest: Manifest
    folder: Path
    embedding_layers: int
    nbytes: int
    held_out: tuple[float, ...]
    scores: tuple[SuiteScore, ...]

    @property
    def parent_name(self) -> str | None:
        """The name of the product it was made from, if any."""
        parent = self.manifest.derived_from
        return None if parent is None else parent.name


@dataclass(frozen=True)
class Lineage:
    """A run: its teacher, if any, its products, oldest first, and the name of the current one."""

    folder: Path
    teacher: Teacher | None
    teacher_scores: tuple[SuiteScore, ...]
    current: str
    products: Mapping[str, ProductSummary]
    # Results that are left out, one sentence each.
    left_out: tuple[str, ...] = ()


def read_lineage(run: Run) -> Lineage:
    """Read the lineage of a run. Raises `RunError` if it is not a run or is damaged."""
    record = run.record
    evaluated = read_run_results(run.folder)
    teacher = record.teacher

    def scores_of(content_hash: str) -> tuple[SuiteScore, ...]:
        return tuple(_scores(evaluated.of_model(content_hash)))

    products = {
        name: ProductSummary(
            manifest,
            run.product_folder(name),
            _embedding_layers(run.product_folder(name)),
            _folder_bytes(run.product_folder(name)),
            tuple(_held_out(run.product_folder(name) / METRICS)),
            scores_of(manifest.content_hash),
        )
        for name, manifest in run.products().items()
    }
    return Lineage(
        run.folder,
        teacher,
        () if teacher is None else scores_of(teacher.content_hash),
        record.current,
        products,
        evaluated.left_out,
    )


def card_scores(run: Run, product: Manifest) -> tuple[tuple[CardScore, ...], tuple[str, ...]]:
    """Scores of `product` for its model card, and a sentence for each result that is left out."""
    from mmmamba_cli.export import CardScore

    evaluated = read_run_results(run.folder)
    teacher = run.record.teacher
    of_teacher = [] if teacher is None else evaluated.of_model(teacher.content_hash)
    scores = tuple(
        CardScore(
            suite=result.title,
            rule=part.rule,
            metric=part.metric,
            value=value,
            rows=result.data.used,
            low=low,
            high=high,
            level=result.level,
            partial=result.data.partial,
            teacher=matching_value(of_teacher, result, part),
        )
        for result in evaluated.of_model(product.content_hash)
        for part in result.rules
        if (value := part.headline) is not None
        for low, high in [part.intervals.get(part.metric, (None, None))]
    )
    return scores, evaluated.left_out


def _scores(results: Iterable[Result]) -> Iterator[SuiteScore]:
    """The headline metric of each rule that has a value."""
    for result in results:
        for part in result.rules:
            value = part.headline
            if value is not None:
                yield SuiteScore(result.title, part.rule, part.metric, value, result.data.partial)


def _held_out(file: Path) -> Iterator[float]:
    for row in read_metrics(file):
        value = row.get(HELD_OUT_LOSS)
        if isinstance(value, int | float):
            yield float(value)
        elif value is not None:
            # JSON has no NaN: such a loss is written as a string.
            yield math.nan


def _embedding_layers(folder: Path) -> int:
    """Number of layers of the embedding stack; 0 if it has none or the config is unreadable."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        return int((config.get("embedding_stack") or {}).get("num_layers", 0))
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
