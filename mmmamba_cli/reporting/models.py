"""The models of a page: their names in charts, kinds, recipes, and whether they were distilled.

All of it is read from files: manifests of products, and config and card of shipped models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from mmmamba_cli.architecture import mixer_spec
from mmmamba_cli.checkpoint import open_checkpoint, public_model_name, shipped_models
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.profiling.interfaces import BASELINES
from mmmamba_cli.profiling.result import SubjectPart
from mmmamba_cli.recipe import Recipe, load_recipe
from mmmamba_cli.reporting.html import Child, Markup, join_markup, paragraph, section, table
from mmmamba_cli.reporting.run_contents import ReportData, RunContents
from mmmamba_cli.reporting.series_styles import swatch
from mmmamba_cli.runs import TEACHER, Manifest, read_manifest
from mmmamba_cli.runs.manifest import MANIFEST

CARD, FENCE = "README.md", "---"
# The key of a model card's front matter, and the keys below it.
CARD_KEY, RECIPE_KEY, FINAL_KEY = "mmmamba", "recipe", "distilled_end_to_end"
# Tensors that are kept on disk only.
UNUSED = "unused."
LESSONS_KEY, STEPS_KEY, BATCH_KEY = "lessons", "steps", "batch"


@dataclass(frozen=True)
class ModelDetails:
    """What is known of a model. `attention` is None if its layers are unknown.

    `final` tells whether a student was distilled end to end; None if unknown, and for teachers.
    """

    label: str
    origin: str
    attention: int | None = None
    layers: int | None = None
    recipe: str | None = None
    final: bool | None = None
    parameters: int | None = None
    # Titles of the mixers that replace attention.
    mixer: str | None = None
    # How a shipped model was trained, as the end of a sentence.
    training: str | None = None

    @property
    def is_teacher(self) -> bool:
        return self.attention is not None and self.attention == self.layers

    @property
    def noun(self) -> str:
        """`teacher`, `linear student` or `hybrid student`; the label if the layers are unknown."""
        if self.attention is None:
            return self.label
        if self.is_teacher:
            return TEACHER
        return "hybrid student" if self.attention else "linear student"

    @property
    def kind(self) -> str | None:
        """The layer plan, as "hybrid, attention in 2 of 8 layers"."""
        if self.attention is None:
            return None
        where = f"attention in {self.attention or 'none'} of {self.layers} layers"
        if self.is_teacher:
            return f"attention in all {self.layers} layers"
        return f"{'hybrid' if self.attention else 'linear'}, {where}"


def model_details(report: ReportData) -> dict[str, ModelDetails]:
    """Details of every model with a score, a curve or a cost, by label."""
    found: dict[str, ModelDetails] = {}
    for run in report.runs:
        for name, product in run.products.items():
            found[run.label(name)] = _product(run.label(name), product, run.recipes.get(name))
    shipped = shipped_models()
    labels = [*report.labels, *(subject for one in report.profiles for subject in names_of(one))]
    for label in dict.fromkeys(labels):
        if label in shipped and label not in found:
            found[label] = _shipped(label, shipped[label])
    found[TEACHER] = _teacher(report.main)
    return found


def names_of(profile: Any) -> list[str]:
    return [subject.name for subject in profile.subjects]


def _product(label: str, product: Manifest, recipe: Recipe | None) -> ModelDetails:
    name = None if recipe is None else recipe.description or None
    return ModelDetails(
        label,
        f"made by {product.made_by}",
        len(product.attention_layers),
        product.num_layers,
        name,
        product.final,
        product.parameters,
        None if recipe is None else mixer_spec(recipe.mixer.kind).title,
    )


def _shipped(name: str, folder: Path) -> ModelDetails:
    """Details of a shipped model from its config, and its manifest or card."""
    origin = "shipped with the package"
    try:
        checkpoint = open_checkpoint(folder)
        config = checkpoint.architecture
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            return _product(name, manifest, None)
    except MmmambaError:
        # The card stays readable where the checkpoint is not.
        return ModelDetails(name, origin)
    card = read_card(folder / CARD)
    recipe, final = card.get(RECIPE_KEY), card.get(FINAL_KEY)
    return ModelDetails(
        name,
        origin,
        len(config.attention_layers),
        config.num_hidden_layers,
        _recipe_label(recipe, len(config.attention_layers)) if isinstance(recipe, str) else None,
        final if isinstance(final, bool) else None,
        count_parameters(checkpoint.shapes),
        _replaced(config.mixer_names, config.attention_layers),
        training_of(card),
    )


def _recipe_label(name: str, attention: int) -> str:
    """The recipe, with the number of attention layers where the model has another one."""
    try:
        planned = load_recipe(name).layers.attention
    except MmmambaError:
        return name
    return name if planned == attention else f"{name}, with layers.attention={attention}"


def _replaced(mixers: Sequence[str], attention_layers: Sequence[int]) -> str | None:
    """The titles of the mixers of all layers but the attention layers."""
    names = [name for i, name in enumerate(mixers) if i not in attention_layers]
    return ", ".join(mixer_spec(name).title for name in dict.fromkeys(names)) or None


def training_of(card: Mapping[str, Any]) -> str | None:
    """Lessons, steps and batch of a card's front matter; None unless it has all three.

    `lessons` is their number, or words for lessons without a number: "drawn while training".
    """
    lessons, steps, batch = (card.get(key) for key in (LESSONS_KEY, STEPS_KEY, BATCH_KEY))
    counted = [one for one in steps if isinstance(one, int)] if isinstance(steps, list) else []
    if not isinstance(lessons, int | str) or not isinstance(batch, int) or not counted:
        return None
    *first, last = (f"{count:,}" for count in counted)
    counts = " and ".join(filter(None, (", ".join(first), last)))
    source = f"drawn from {lessons:,} lessons" if isinstance(lessons, int) else f"lessons {lessons}"
    return f"{counts} steps of {batch:,} conversations, {source}"


def read_card(file: Path) -> Mapping[str, Any]:
    """The entry `mmmamba` of a model card's front matter; empty if there is none."""
    try:
        head, *rest = file.read_text(encoding="utf-8-sig").split("\n")
        if head.strip() != FENCE or FENCE not in rest:
            return {}
        front = yaml.safe_load("\n".join(rest[: rest.index(FENCE)]))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    entry = front.get(CARD_KEY) if isinstance(front, dict) else None
    return entry if isinstance(entry, dict) else {}


def _teacher(run: RunContents) -> ModelDetails:
    name = teacher_shown(run)
    layers = next((product.num_layers for product in run.products.values()), None)
    return ModelDetails(
        TEACHER, name or "the run's teacher", layers, layers, parameters=_parameters(name)
    )


def count_parameters(shapes: Mapping[str, Sequence[int]]) -> int:
    """Parameters of a checkpoint, without tensors that no forward pass uses."""
    return sum(prod(shape) for name, shape in shapes.items() if not name.startswith(UNUSED))


def _parameters(name: str | None) -> int | None:
    """The number of parameters of a shipped model."""
    folder = shipped_models().get(name or "")
    try:
        return None if folder is None else count_parameters(open_checkpoint(folder).shapes)
    except MmmambaError:
        return None


def teacher_shown(run: RunContents) -> str | None:
    """The public name of the run's teacher, None if it has none."""
    return None if run.teacher is None else public_model_name(run.teacher.path)


def subject_label(subject: SubjectPart, report: ReportData) -> str:
    """The label of a profile's subject: the teacher's weights are `teacher` by whatever name.

    Two ways to decode the teacher keep their names, since they differ in cost.
    """
    if subject.role in BASELINES or subject.name in report.main.products:
        return subject.name
    return TEACHER if subject.name == teacher_shown(report.main) else subject.name


def series_of(report: ReportData, first: Iterable[str] = ()) -> dict[str, int]:
    """A style number for each model, the same in all charts: the teacher's is 0.

    `first` are the labels of the lead, which get the styles that differ most.
    """
    labels = [TEACHER, *first, *report.labels]
    for profile in report.profiles:
        labels += [subject_label(subject, report) for subject in profile.subjects]
    for run in report.runs:
        labels += [run.label(name) for name in (run.mixers.layers if run.mixers else ())]
        labels += [one.label for one in run.trained]
        labels += [TEACHER if name == TEACHER else run.label(name) for name in run.stability]
    return {label: number for number, label in enumerate(dict.fromkeys(labels))}


def models_section(
    series: Mapping[str, int], details: Mapping[str, ModelDetails], shown: Iterable[str]
) -> Markup:
    """The models and how they are drawn: the page's legend."""
    rows: list[tuple[Child, ...]] = []
    trained: list[str] = []
    for label in shown:
        one = details.get(label, ModelDetails(label, ""))
        final = None if one.is_teacher or one.final is None else "yes" if one.final else "no"
        name = join_markup((swatch(series[label]), " ", label))
        size = None if one.parameters is None else f"{one.parameters / 1e6:.1f} M"
        rows.append((name, one.kind, size, one.origin or None, one.recipe, final))
        if one.training is not None:
            trained.append(f"{label} in {one.training}")
    heading = ("model", "layers", "parameters", "from", "recipe", "distilled end to end")
    return section(
        "models",
        "The models on this page",
        paragraph("Each has the same colour, marker and dashes in all charts."),
        table("Models", heading, rows, words=True),
        paragraph(
            f"How the shipped students were trained, stage by stage: {'; '.join(trained)}. A "
            "lesson is a drawn picture with questions and answers about it."
        )
        if trained
        else None,
    )
