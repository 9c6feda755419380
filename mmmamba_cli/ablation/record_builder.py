"""The parts of a cell's record, from the files of its run: model, stages and answers."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mmmamba_cli.ablation.answers import Questions, Texts, write_questions
from mmmamba_cli.ablation.cell_record import ModelRecord, RuleRecord, StageRecord, SuiteRecord
from mmmamba_cli.ablation.cells import Cell
from mmmamba_cli.ablation.plan import SuiteUse
from mmmamba_cli.devices import pick_device
from mmmamba_cli.distill import read_metrics
from mmmamba_cli.distill.metrics import METRICS
from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.result import PREDICTIONS, ScoredSuite
from mmmamba_cli.recipe import dump_recipe
from mmmamba_cli.runs import Manifest, ResolvedModel, Run
from mmmamba_cli.runs.provenance import redact_recipe


def device_name(device: str | None) -> str:
    """The name of the GPU, or CPU."""
    chosen = pick_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "CPU"


def recipe_fields(cell: Cell) -> dict[str, Any]:
    if cell.recipe is None:
        return {}
    text = redact_recipe(dump_recipe(cell.recipe))
    return {"recipe": text, "recipe_sha256": hashlib.sha256(text.encode()).hexdigest()}


def model_record(resolved: ResolvedModel, run: Run) -> ModelRecord:
    if resolved.origin != "product":
        return ModelRecord(
            product=resolved.name,
            kind="teacher",
            content_hash=resolved.content_hash or resolved.opened.source.content_hash(),
        )
    product = run.product(resolved.name)
    parent = product.derived_from
    return ModelRecord(
        product=product.name,
        kind=product.kind,
        content_hash=product.content_hash,
        parameters=product.parameters,
        parent=None if parent is None else (parent.name, parent.content_hash),
        attention_layers=product.attention_layers,
        data=product.data,
    )


def stage_products(run: Run, name: str) -> list[Manifest]:
    """The products of the stages that a product has been through, the first stage first."""
    product = run.product(name)
    line = [product, *(one for _, one in run.ancestors(product))]
    return [one for one in reversed(line) if one.made_by == "distill"]


def stage_record(run: Run, product: Manifest) -> StageRecord:
    rows = list(read_metrics(run.product_folder(product.name) / METRICS))
    held_out = [
        {"step": row["step"]}
        | {k.removeprefix("held_out/"): v for k, v in row.items() if k.startswith("held_out/")}
        for row in rows
        if "held_out/loss" in row
    ]
    loss = rows[-1]["loss"] if rows else None
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    memory = [row["memory_gib"] for row in rows if "memory_gib" in row]
    return StageRecord(
        name=product.stages[-1],
        product=product.name,
        steps=product.metrics["step"],
        tokens=product.metrics["tokens"],
        samples=product.metrics["samples"],
        loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        tokens_per_second=median(speeds) if speeds else None,
        memory_gib=max(memory) if memory else None,
        held_out=tuple(held_out),
    )


def suite_record(use: SuiteUse, scored: ScoredSuite, folder: Path, out: Path) -> SuiteRecord:
    """The answers of a cell as its JSON has them.

    Raises `RunError` if the scores do not follow from them: its comparisons would be wrong.
    """
    result = scored.result
    with (folder / PREDICTIONS).open(encoding="utf-8-sig", newline="") as handle:
        given = [row["prediction"] for row in csv.DictReader(handle, delimiter="\t")]
    answers = Texts.of(given)
    questions = Questions.of(result.suite, scored.rows)
    rules = []
    for part in result.rules:
        again = questions.scores(part.scoring, answers).values()
        if again != part.metrics:
            raise RunError(
                f"suite {use.title}: the scores of rule {part.rule} cannot be computed from the "
                "stored answers, so that cells cannot be compared",
                "give another rule of the suite in the plan"
                if len(result.rules) > 1
                else "leave the suite out of the plan",
            )
        rules.append(
            RuleRecord(
                rule=part.rule,
                scoring=part.scoring,
                metric=part.metric,
                metrics=part.metrics,
                intervals=part.intervals,
            )
        )
    return SuiteRecord(
        label=use.title,
        suite=result.suite,
        version=result.version,
        suite_digest=result.suite_digest,
        data_sha256=result.data.sha256,
        asked=result.data.used,
        not_asked=len(result.not_asked),
        questions=write_questions(out, questions),
        answers=answers,
        correct=questions.correct(rules[0].scoring, answers) if rules else "",
        settings=result.settings,
        rules=tuple(rules),
    )
