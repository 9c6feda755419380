"""Similarity of each product's mixers to the teacher's attention, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.reporting.charts import Line, lines
from mmmamba_cli.reporting.html import Markup, figure, join_markup, paragraph, section, table, tag
from mmmamba_cli.reporting.series_styles import legend
from mmmamba_cli.runs import Manifest
from mmmamba_cli.runs.manifest import read_json_as

# The file of a run, and the one that `mmmamba seed` writes beside the seeded weights.
FIDELITY, SEED = "fidelity.json", "seed"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class LayerSimilarity(BaseModel):
    """A student's mixer output before W_O against the teacher's, on the teacher's hidden states.

    `cosine` is the mean over tokens and heads; `relative_mse` is |s - t|^2 / |t|^2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    cosine: Finite
    relative_mse: Finite


class ProductSimilarity(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    content_hash: str
    layers: tuple[LayerSimilarity, ...] = Field(min_length=1)


class Fidelity(BaseModel):
    """The contents of a run's `fidelity.json`.

    {"format": 1, "inputs": "24 held-out conversations", "command": "...", "created": "...",
     "products": {"stage1": {"content_hash": "...",
                             "layers": [{"layer": 0, "cosine": 0.5, "relative_mse": 0.8}]}}}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    inputs: str
    command: str
    created: str
    products: dict[str, ProductSimilarity]


@dataclass(frozen=True)
class MixerFidelity:
    """Layers by product, of the products whose weights are those that were measured."""

    inputs: str
    command: str | None
    created: str | None
    layers: Mapping[str, tuple[LayerSimilarity, ...]]


def read_fidelity(
    run: Path, products: Mapping[str, Manifest], remarks: list[str]
) -> MixerFidelity | None:
    """The run's similarities, else those that seeding measured; problems go to `remarks`."""
    if not (run / FIDELITY).is_file():
        return _seed_fidelity(run / "products" / SEED / FIDELITY, remarks)
    try:
        found = read_json_as(run / FIDELITY, Fidelity)
    except MmmambaError as error:
        remarks.append(error.message)
        return None
    current = {}
    for name, one in found.products.items():
        product = products.get(name)
        if product is not None and product.content_hash == one.content_hash:
            current[name] = one.layers
        else:
            remarks.append(f"the similarity of {name}'s mixers is of other weights and is left out")
    if not current:
        return None
    return MixerFidelity(found.inputs, found.command, found.created, current)


def _seed_fidelity(file: Path, remarks: list[str]) -> MixerFidelity | None:
    if not file.is_file():
        return None
    try:
        layers = TypeAdapter(tuple[LayerSimilarity, ...]).validate_json(file.read_bytes())
    except (OSError, ValidationError):
        remarks.append(f"{SEED}/{FIDELITY} is damaged and left out")
        return None
    if not layers:
        return None
    return MixerFidelity("the inputs built into mmmamba seed", None, None, {SEED: layers})


@dataclass(frozen=True)
class RunFidelity:
    """The similarities of a run, under the labels of its products."""

    title: str
    inputs: str
    layers: Mapping[str, tuple[LayerSimilarity, ...]]


def fidelity_section(runs: Sequence[RunFidelity], series: Mapping[str, int]) -> Markup:
    """A panel per run: cosine similarity over layers, a line per product."""
    panels: list[Markup] = []
    names: dict[str, int] = {}
    for run in runs:
        drawn = [_line(label, layers, series) for label, layers in run.layers.items()]
        names |= {label: series[label] for label in run.layers}
        layers = sorted({x for line in drawn for x, _ in line.points})
        chart = lines(
            f"Cosine similarity of {run.title}",
            drawn,
            x_name="layer",
            y_name="cosine similarity",
            x_ticks=layers,
        )
        panels.append(tag("div", tag("h3", run.title), chart))
    inputs = " and ".join(dict.fromkeys(run.inputs for run in runs))
    return section(
        "fidelity",
        "Each layer's mixer imitates the attention it replaces",
        *(paragraph(sentence) for run in runs for sentence in _sentences(run)),
        figure(
            join_markup((legend(names), tag("div", *panels, class_="panels"))),
            "Cosine similarity of a mixer's output with that of the teacher's attention, before "
            f"the output projection, on the teacher's hidden states of {inputs}: 1 is the same "
            "direction, 0 none in common. Higher is better. The first two stages train this; the "
            "last stage trains the probabilities of tokens.",
            _numbers(runs),
        ),
    )


def _line(label: str, layers: Sequence[LayerSimilarity], series: Mapping[str, int]) -> Line:
    points = tuple((float(one.layer), one.cosine) for one in layers)
    return Line(label, series[label], points, marked=True)


def _sentences(run: RunFidelity) -> list[str]:
    """Mean similarity from the first product to each later one."""
    means = {
        # Adding zero drops the sign of a mean that rounds to zero.
        label: round(fmean(one.cosine for one in layers), 2) + 0.0
        for label, layers in run.layers.items()
    }
    (first, value), *later = means.items()
    if not later:
        return [f"{run.title}: {first} has a mean cosine similarity of {value:.2f}."]
    steps = ", ".join(f"{label} {mean:.2f}" for label, mean in later)
    return [f"{run.title}, mean over layers: {first} {value:.2f}, {steps}."]


def _numbers(runs: Sequence[RunFidelity]) -> Markup:
    numbers = sorted({one.layer for run in runs for part in run.layers.values() for one in part})
    rows = []
    for run in runs:
        for label, layers in run.layers.items():
            cosines = {one.layer: one.cosine for one in layers}
            cells = (f"{cosines[i]:.3f}" if i in cosines else None for i in numbers)
            rows.append((label, *cells))
    heading = ("product", *(f"layer {i}" for i in numbers))
    return table("Cosine similarity by layer", heading, rows)
