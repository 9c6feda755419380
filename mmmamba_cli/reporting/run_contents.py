"""What a report is made of: read from runs, without a model, and without believing all is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint import shipped_models
from mmmamba_cli.distill import METRICS, read_metrics
from mmmamba_cli.errors import MmmambaError, RunError
from mmmamba_cli.evaluate import Result
from mmmamba_cli.evaluate.predictions import read_predictions
from mmmamba_cli.evaluate.result import TIMING, RulePart, find_results
from mmmamba_cli.profiling import Profile, read_profile
from mmmamba_cli.profiling.result import PROFILE
from mmmamba_cli.recipe import Recipe, parse_recipe
from mmmamba_cli.reporting.external_comparisons import Comparison, read_comparisons
from mmmamba_cli.runs import TEACHER, Manifest, Run
from mmmamba_cli.runs.run import Teacher

EVALS, PROFILES, ANSWERS = "evals", "profile", "predictions.tsv"


@dataclass(frozen=True)
class Trained:
    """A product that a stage of distillation made, and the lines of its metrics."""

    label: str
    product: Manifest
    recipe: Recipe
    rows: list[dict[str, Any]]

    @property
    def stage(self) -> str:
        return self.product.stages[-1]


@dataclass(frozen=True)
class Evaluated:
    """What a model scored in a suite, and its answers by index, cells of `predictions.tsv`."""

    label: str
    result: Result
    command: str | None
    finished: str | None
    answers: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Told:
    """What one run says about itself. `name` is None for the run that the report is about."""

    folder: Path
    name: str | None
    teacher: Teacher | None
    current: str
    products: Mapping[str, Manifest]
    recipes: Mapping[str, Recipe]
    trained: Sequence[Trained] = ()
    evaluated: Sequence[Evaluated] = ()
    profile: Profile | None = None
    # What could not be read, or does not fit, a sentence each.
    remarks: tuple[str, ...] = ()

    def label(self, name: str) -> str:
        """What a model of this run is called beside those of other runs."""
        return name if self.name is None else f"{name} ({self.name})"

    def heirs(self, name: str) -> list[str]:
        """Products made of a product, directly or by others, oldest first."""
        found = {name}
        for other, product in self.products.items():
            if any(p.role == "student" and p.name in found for p in product.parents):
                found.add(other)
        return [other for other in self.products if other in found and other != name]


@dataclass(frozen=True)
class Material:
    """Several runs; the first is the one the report is about."""

    runs: Sequence[Told]
    comparisons: Sequence[Comparison] = ()
    remarks: tuple[str, ...] = ()

    @property
    def main(self) -> Told:
        return self.runs[0]

    @property
    def evaluated(self) -> list[Evaluated]:
        """All results, the teacher's first, then in the order the models were made."""
        found = [one for run in self.runs for one in run.evaluated]
        return sorted(found, key=lambda one: self.order(one.label))

    @property
    def trained(self) -> list[Trained]:
        return [one for run in self.runs for one in run.trained]

    @property
    def labels(self) -> list[str]:
        """Every model that has a result, in the order in which they are shown first."""
        labels = [one.label for one in self.evaluated]
        labels += [name for comparison in self.comparisons for name in comparison.models]
        return list(dict.fromkeys(labels))

    def order(self, label: str) -> tuple[int, int]:
        """Where a model stands: teacher, products as they were made, models from elsewhere."""
        if label == TEACHER:
            return 0, 0
        made = [run.label(name) for run in self.runs for name in run.products]
        return (1, made.index(label)) if label in made else (2, 0)


def parts_by_label(results: Sequence[Evaluated]) -> dict[str, RulePart]:
    """Each result's part by the first rule that all of them were scored by.

    Where they have no rule in common it is the first rule of each: see `RulePart.rule`. Results
    without rules are left out.
    """
    scored = [one for one in results if one.result.rules]
    if not scored:
        return {}
    first = next(
        (
            part.rule
            for part in scored[0].result.rules
            if all(one.result.rule(part.rule) for one in scored)
        ),
        "",
    )
    return {one.label: one.result.rule(first) or one.result.rules[0] for one in scored}


def read_material(run: Path, beside: Sequence[Path] = ()) -> Material:
    """Read a run, and others that its models are to be compared with.

    Raises `RunError` if one of them is no run, or two are called alike. What is damaged inside of
    one is left out and told in `remarks`.
    """
    names = [folder.resolve().name for folder in beside]
    if len(set(names)) < len(names):
        raise RunError(
            f"two runs to compare with are called {', '.join(sorted(names))}",
            "their folders' names tell their models apart: rename one",
        )
    told = [_read_run(run, None)]
    told += [_read_run(folder, name) for folder, name in zip(beside, names, strict=True)]
    remarks: list[str] = []
    comparisons = read_comparisons(run, remarks)
    return Material(told, comparisons, (*(r for one in told for r in one.remarks), *remarks))


def _read_run(folder: Path, name: str | None) -> Told:
    run = Run(folder)
    record, products = run.record, run.products()
    remarks: list[str] = []
    recipes = {}
    for key, product in products.items():
        try:
            recipes[key] = parse_recipe(product.recipe, f"recipe of {key}")
        except MmmambaError as error:
            remarks.append(f"{key}: {error.message}")
    told = Told(folder, name, record.teacher, record.current, products, recipes)
    return replace(
        told,
        trained=list(_trained(run, told)),
        evaluated=list(_evaluated(told, remarks)),
        profile=_profile(told, remarks),
        remarks=tuple(remarks),
    )


def _trained(run: Run, told: Told) -> Iterator[Trained]:
    for name, product in told.products.items():
        file = run.product_folder(name) / METRICS
        rows = [row for row in read_metrics(file) if _is_step(row)]
        if rows and product.stages and name in told.recipes:
            yield Trained(told.label(name), product, told.recipes[name], rows)


def _is_step(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row


def _evaluated(told: Told, remarks: list[str]) -> Iterator[Evaluated]:
    evaluated = find_results(told.folder / EVALS)
    remarks += evaluated.left_out
    for file, result in evaluated.results.items():
        product = told.products.get(result.model.name)
        if product is not None and product.content_hash != result.model.content_hash:
            remarks.append(
                f"{told.label(product.name)} was made again after it was asked {result.suite}: "
                "its answers, of the earlier weights, are left out"
            )
            continue
        timing = _json(file.parent / TIMING)
        label = _own_label(told, result)
        yield Evaluated(
            label,
            result,
            _text(timing.get("command")),
            _text(timing.get("finished")),
            _answers(file.parent / ANSWERS, remarks),
        )


def _own_label(told: Told, result: Result) -> str:
    """Products are called by their run too; a model that ships is the same in every run."""
    name = result.model.name
    same = name == TEACHER or (name not in told.products and name in shipped_models())
    return name if same else told.label(name)


def _answers(file: Path, remarks: list[str]) -> dict[str, Mapping[str, str]]:
    if not file.is_file():
        return {}
    try:
        return {cell["index"]: cell for cell in read_predictions(file).cells}
    except MmmambaError as error:
        remarks.append(error.message)
        return {}


def _profile(told: Told, remarks: list[str]) -> Profile | None:
    file = told.folder / PROFILES / PROFILE
    if not file.is_file():
        return None
    try:
        found = read_profile(file)
    except MmmambaError as error:
        remarks.append(error.message)
        return None
    for subject in found.subjects:
        product = told.products.get(subject.name)
        if product is not None and subject.content_hash not in (None, product.content_hash):
            remarks.append(
                f"{told.label(subject.name)} was made again after it was profiled: its costs are "
                "those of the earlier weights"
            )
    return found


def _json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        # Times are extra: a result without them is a result.
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
