"""Contents of runs for a report, read from their files; parts that are missing are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmmamba_cli.checkpoint import shipped_models
from mmmamba_cli.distill import METRICS, read_metrics
from mmmamba_cli.errors import MmmambaError, RunError
from mmmamba_cli.evaluate import Result
from mmmamba_cli.evaluate.predictions import read_predictions
from mmmamba_cli.evaluate.result import PREDICTIONS, TIMING, RuleResult
from mmmamba_cli.evaluate.run_results import read_run_results
from mmmamba_cli.profiling import Profile, read_profile
from mmmamba_cli.profiling.result import PROFILE_FILE
from mmmamba_cli.recipe import Recipe, parse_recipe
from mmmamba_cli.reporting.measured_results import MeasuredResults, read_measured_results
from mmmamba_cli.reporting.mixer_fidelity import MixerFidelity, read_fidelity
from mmmamba_cli.runs import TEACHER, Manifest, Run, resolve_product
from mmmamba_cli.runs.manifest import read_json_as
from mmmamba_cli.runs.run import Teacher
from mmmamba_cli.stability import (
    STABILITY,
    STABILITY_FILE,
    StabilityRecord,
    read_stability,
)

PROFILES, COMPARISONS = "profile", "comparisons"

NOTHING_MEASURED = MeasuredResults()

Count = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ExternalComparison(BaseModel):
    """Scores that another program measured unit by unit: a file `comparisons/*.json` of a run.

        {"format": 1, "title": "...", "metric": "...", "unit": "lesson", "command": "...",
         "created": "...", "models": {"linear": [[right, asked], ...], "x": [...]},
         "compare": [["linear", "x"]]}

    Each pair of numbers is one unit; the score of a model is 100 * sum(right) / sum(asked). The
    bootstrap draws units jointly, so all models must have been asked the same ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    title: str
    metric: str
    unit: str
    command: str
    created: str
    models: dict[str, list[tuple[Count, Count]]] = Field(min_length=1)
    compare: list[tuple[str, str]] = []
    # A sentence on how the models differ, shown below the differences.
    note: str | None = None

    @model_validator(mode="after")
    def _check(self) -> ExternalComparison:
        asked = {tuple(of for _, of in units) for units in self.models.values()}
        if any(right > of for units in self.models.values() for right, of in units):
            raise ValueError("a unit has more right than were asked")
        if len(asked) != 1 or not sum(next(iter(asked))):
            raise ValueError("the models were not asked the same units, or none")
        unknown = {name for pair in self.compare for name in pair} - set(self.models)
        if unknown:
            raise ValueError(f"compare names {', '.join(sorted(unknown))}, which models has not")
        return self

    @property
    def units(self) -> int:
        return len(next(iter(self.models.values())))


@dataclass(frozen=True)
class TrainedStage:
    """A product that a stage of distillation made, and the rows of its metrics file."""

    label: str
    product: Manifest
    recipe: Recipe
    rows: list[dict[str, Any]]

    @property
    def stage(self) -> str:
        return self.product.stages[-1]


@dataclass(frozen=True)
class ModelResult:
    """Result of a model in a suite, and its rows of `predictions.tsv` by index."""

    label: str
    result: Result
    command: str | None
    finished: str | None
    answers: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class RunContents:
    """Contents of one run. `name` is None for the main run, the subject of the report."""

    folder: Path
    name: str | None
    teacher: Teacher | None
    current: str
    products: Mapping[str, Manifest]
    recipes: Mapping[str, Recipe]
    trained: Sequence[TrainedStage] = ()
    evaluated: Sequence[ModelResult] = ()
    profile: Profile | None = None
    mixers: MixerFidelity | None = None
    # By name of a product or `teacher`.
    stability: Mapping[str, StabilityRecord] = field(default_factory=dict)
    # Whether the current product reads pictures, which the shipped suites ask about.
    reads_pictures: bool = True
    # Problems while reading, one sentence each.
    remarks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name if self.name is None else self.name

    def label(self, name: str) -> str:
        """Name of a model of this run in a report on several runs."""
        return name if self.name is None else f"{name} ({self.name})"

    def descendants(self, name: str) -> list[str]:
        """Products made from a product, directly or indirectly, oldest first."""
        found = {name}
        for other, product in self.products.items():
            if any(p.role == "student" and p.name in found for p in product.parents):
                found.add(other)
        return [other for other in self.products if other in found and other != name]


@dataclass(frozen=True)
class ReportData:
    """Contents of all runs of a report; the first run is the main one."""

    runs: Sequence[RunContents]
    comparisons: Sequence[ExternalComparison] = ()
    remarks: tuple[str, ...] = ()
    measured: MeasuredResults = NOTHING_MEASURED

    @property
    def profiles(self) -> list[Profile]:
        """The profiles of `measured`, then the main run's."""
        own = [] if self.main.profile is None else [self.main.profile]
        return [*(profile for _, profile in self.measured.profiles), *own]

    @property
    def main(self) -> RunContents:
        return self.runs[0]

    @property
    def evaluated(self) -> list[ModelResult]:
        """All results: the teacher's first, then in the order in which the models were made."""
        found = [one for run in self.runs for one in run.evaluated]
        return sorted(found, key=lambda one: self.order(one.label))

    @property
    def trained(self) -> list[TrainedStage]:
        return [one for run in self.runs for one in run.trained]

    @property
    def labels(self) -> list[str]:
        """Every model with a result, in the order of its first appearance."""
        labels = [one.label for one in self.evaluated]
        labels += [name for comparison in self.comparisons for name in comparison.models]
        return list(dict.fromkeys(labels))

    def order(self, label: str) -> tuple[int, int]:
        """Sort key: the teacher, products as they were made, other models."""
        if label == TEACHER:
            return 0, 0
        made = [run.label(name) for run in self.runs for name in run.products]
        return (1, made.index(label)) if label in made else (2, 0)


def parts_by_label(results: Sequence[ModelResult]) -> dict[str, RuleResult]:
    """Each result's scores by the first rule that all results have in common.

    Without a common rule it is the first rule of each, see `RuleResult.rule`. Results without rules
    are left out.
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


def read_report_data(
    run: Path, beside: Sequence[Path] = (), results: Sequence[Path] = ()
) -> ReportData:
    """Read a run, other runs to compare its models with, and files of measured results.

    Damaged files of a run are left out and named in `remarks`.

    Raises:
        RunError: if a folder is not a run, two runs have the same name, a run is also among
            `beside`, or a file of `results` cannot be read.
    """
    measured = read_measured_results(results)
    names = [folder.resolve().name for folder in beside]
    if len(set(names)) < len(names):
        raise RunError(
            f"two runs to compare with are called {', '.join(sorted(names))}",
            "their folders' names tell their models apart: rename one",
        )
    if run.resolve() in [folder.resolve() for folder in beside]:
        raise RunError(f"{run} would be compared with itself", "name another run with --beside")
    runs = [_read_run(run, None)]
    runs += [_read_run(folder, name) for folder, name in zip(beside, names, strict=True)]
    remarks: list[str] = []
    comparisons = read_comparisons(run, remarks)
    remarks = [*(remark for one in runs for remark in one.remarks), *remarks]
    return ReportData(runs, comparisons, tuple(remarks), measured)


def read_comparisons(run: Path, remarks: list[str]) -> list[ExternalComparison]:
    """The external comparisons of a run by file name; unreadable files are added to `remarks`."""
    found = []
    for file in sorted((run / COMPARISONS).glob("*.json")):
        try:
            found.append(read_json_as(file, ExternalComparison))
        except MmmambaError as error:
            remarks.append(error.message)
    return found


def read_run_stability(contents: RunContents, remarks: list[str]) -> dict[str, StabilityRecord]:
    """The stability of a run's models, the teacher's first, in the order in which they were made.

    Results of other weights and damaged files are left out and added to `remarks`.
    """
    hashes = {name: product.content_hash for name, product in contents.products.items()}
    if contents.teacher is not None:
        hashes = {TEACHER: contents.teacher.content_hash, **hashes}
    found = {}
    for name, content_hash in hashes.items():
        file = contents.folder / STABILITY / name / STABILITY_FILE
        if not file.is_file():
            continue
        try:
            record = read_stability(file)
        except MmmambaError as error:
            remarks.append(error.message)
            continue
        if record.content_hash == content_hash:
            found[name] = record
        else:
            remarks.append(
                f"{contents.label(name)} was made again after its stability was measured: that of "
                "the earlier weights is left out"
            )
    return found


def _read_run(folder: Path, name: str | None) -> RunContents:
    run = Run(folder)
    record, products = run.record, run.products()
    remarks: list[str] = []
    recipes = {}
    for key, product in products.items():
        try:
            recipes[key] = parse_recipe(product.recipe, f"recipe of {key}")
        except MmmambaError as error:
            remarks.append(f"{key}: {error.message}")
    contents = RunContents(folder, name, record.teacher, record.current, products, recipes)
    return replace(
        contents,
        trained=list(_trained(run, contents)),
        evaluated=list(_evaluated(contents, remarks)),
        profile=_profile(contents, remarks),
        mixers=read_fidelity(folder, products, remarks),
        stability=read_run_stability(contents, remarks),
        reads_pictures=_reads_pictures(run),
        remarks=tuple(remarks),
    )


def _reads_pictures(run: Run) -> bool:
    try:
        return resolve_product(run).has_vision
    except MmmambaError:
        # A damaged product is named where it is opened.
        return True


def _trained(run: Run, contents: RunContents) -> Iterator[TrainedStage]:
    for name, product in contents.products.items():
        file = run.product_folder(name) / METRICS
        rows = [row for row in read_metrics(file) if _is_step(row)]
        if rows and product.stages and name in contents.recipes:
            yield TrainedStage(contents.label(name), product, contents.recipes[name], rows)


def _is_step(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row


def _evaluated(contents: RunContents, remarks: list[str]) -> Iterator[ModelResult]:
    evaluated = read_run_results(contents.folder)
    remarks += evaluated.left_out
    for file, result in evaluated.results.items():
        name = result.model.name
        made = contents.teacher if name == TEACHER else contents.products.get(name)
        if made is not None and made.content_hash != result.model.content_hash:
            remarks.append(
                f"{contents.label(name)} was made again after it was asked {result.suite}: "
                "its answers, of the earlier weights, are left out"
            )
            continue
        timing = _read_json(file.parent / TIMING)
        label = _result_label(contents, result)
        yield ModelResult(
            label,
            result,
            _string(timing.get("command")),
            _string(timing.get("finished")),
            _answers(file.parent / PREDICTIONS, remarks),
        )


def _result_label(contents: RunContents, result: Result) -> str:
    """Label with the run's name, except for the teacher and shipped models."""
    name = result.model.name
    same = name == TEACHER or (name not in contents.products and name in shipped_models())
    return name if same else contents.label(name)


def _answers(file: Path, remarks: list[str]) -> dict[str, Mapping[str, str]]:
    if not file.is_file():
        return {}
    try:
        return {cell["index"]: cell for cell in read_predictions(file).cells}
    except MmmambaError as error:
        remarks.append(error.message)
        return {}


def _profile(contents: RunContents, remarks: list[str]) -> Profile | None:
    file = contents.folder / PROFILES / PROFILE_FILE
    if not file.is_file():
        return None
    try:
        found = read_profile(file)
    except MmmambaError as error:
        remarks.append(error.message)
        return None
    for subject in found.subjects:
        product = contents.products.get(subject.name)
        if product is not None and subject.content_hash not in (None, product.content_hash):
            remarks.append(
                f"{contents.label(subject.name)} was made again after it was profiled: its costs "
                "are those of the earlier weights"
            )
    return found


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        # Times are optional.
        return {}
    return value if isinstance(value, dict) else {}


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None
