"""The model card of an export: architecture, usage, lineage, scores and recipe.

Paths of this machine are redacted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mmmamba_cli import __version__
from mmmamba_cli.architecture import LINEAR, join_and, spec_of
from mmmamba_cli.checkpoint import Checkpoint, hub_name, public_model_name
from mmmamba_cli.checkpoint.model_names import check_repository_id
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.export.layouts import HOVLE, HUB, MMMAMBA_HF
from mmmamba_cli.export.teacher_licence import TeacherLicence
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.runs import Manifest, Run
from mmmamba_cli.runs.provenance import (
    PUBLISHED_NOTE,
    Provenance,
    provenance_of,
    redact_command,
    redact_path,
    redact_recipe,
    redact_text,
    redact_value,
)

FORMAT_TITLES = {
    HUB: "mmmamba's own layout, with the code that reads it",
    MMMAMBA_HF: "the layout mmMamba was published in",
    HOVLE: "HoVLE's layout",
}
# Roles of the parents that a run started from.
TEACHER_ROLES = ("teacher", "origin")
LICENCE_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
PAPER_TAG = "arxiv:2502.13145"


@dataclass(frozen=True)
class CardScore:
    """Score of a suite by one rule; `low` and `high` are its confidence interval at `level`."""

    suite: str
    rule: str
    metric: str
    value: float
    rows: int
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    # Whether only a part of the suite's rows was asked.
    partial: bool = False
    # The teacher's score by the same rule on the same questions; None without one.
    teacher: float | None = None


@dataclass(frozen=True)
class CardInfo:
    """Content of a model card besides the checkpoint's own.

    `manifest` is None for a checkpoint that is not a product; `lineage` are the product's
    ancestors, oldest first. Raises `CheckpointError` for an invalid licence, title or base model.
    """

    manifest: Manifest | None = None
    lineage: tuple[Manifest, ...] = ()
    scores: tuple[CardScore, ...] = ()
    licence: str | None = None
    title: str | None = None
    # The teacher's repository on the Hub, OWNER/NAME.
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and LICENCE_NAME.fullmatch(self.licence) is None:
            raise CheckpointError(
                f"{self.licence!r} is no name of a licence", "expected one such as apache-2.0"
            )
        if self.title is not None and not self.title.isprintable():
            raise CheckpointError(f"{self.title!r} is no title", "give one line of text")
        if self.base_model is not None:
            check_repository_id(self.base_model)


def unchanged_ancestors(run: Run, product: Manifest) -> tuple[Manifest, ...]:
    """Ancestors of `product`, oldest first, back to the first that was overwritten since."""
    unchanged = takewhile(
        lambda link: link[0].content_hash == link[1].content_hash, run.ancestors(product)
    )
    return tuple(ancestor for _, ancestor in unchanged)[::-1]


def card_text(
    checkpoint: Checkpoint, name: str, dtype: str, parameters: int, card: CardInfo
) -> str:
    """The text of README.md of an export in format `name`."""
    config = checkpoint.config
    title = card_title(checkpoint.path, card)
    task = "image-text-to-text" if config.vision is not None else "text-generation"
    lines = [
        *front_matter(task, title, card, TeacherLicence()),
        f"# {title}",
        "",
        f"{_describe_layers(config)}. {parameters / 1e6:,.1f} M parameters in {dtype}, in "
        f"{FORMAT_TITLES[name]}.",
        *_distillation_note(checkpoint, card.manifest),
        "",
        *_usage_section(checkpoint, name),
        *run_sections(card),
    ]
    return "\n".join(lines) + "\n"


def card_title(path: Path, card: CardInfo) -> str:
    """The title that was given, else the name of the checkpoint."""
    return card.title or public_model_name(path) or path.resolve().name


def run_sections(card: CardInfo) -> list[str]:
    """Lineage, scores and recipe of a product, and the last line of a card."""
    return [
        *_lineage_section(card),
        *_scores_section(card.scores),
        *_recipe_section(card.manifest),
        f"Written by mmmamba {__version__}.",
    ]


def redact_manifest(manifest: Manifest, dtype: str, content_hash: str) -> Manifest:
    """The manifest of an exported product, with every path shortened to its name."""
    parents = tuple(
        parent.model_copy(update={"name": redact_path(parent.name)}) for parent in manifest.parents
    )
    changes = {
        "parents": parents,
        "command": redact_command(manifest.command),
        "dtype": dtype,
        "content_hash": content_hash,
        "recipe": redact_recipe(manifest.recipe),
        "notes": tuple(map(redact_text, manifest.notes)),
        "metrics": redact_value(manifest.metrics),
    }
    return manifest.model_copy(update=changes)


def _describe_layers(config: HolisticVLMConfig) -> str:
    kept, total = config.attention_layers, config.num_hidden_layers
    linear = [spec_of(config, layer).title for layer in range(total) if layer not in kept]
    return describe_layers(kept, total, linear)


def describe_layers(kept: Sequence[int], total: int, linear: Sequence[str]) -> str:
    """The layers `kept` as attention, and the titles of the mixers of the other ones, in words."""
    # The most frequent mixer first, and equally frequent ones in the order of layers.
    mixers = join_and(sorted(dict.fromkeys(linear), key=linear.count, reverse=True))
    if not kept:
        return f"A linear model: {mixers} in all {total} layers"
    if len(kept) == total:
        return f"A model with attention in all {total} layers"
    listed = f"layer{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))}"
    return f"A hybrid: attention in {listed} of {total}, {mixers} in the others"


def front_matter(task: str, title: str, card: CardInfo, licence: TeacherLicence) -> list[str]:
    """The card's metadata as YAML, written by huggingface_hub; `card.licence` comes first."""
    from huggingface_hub import EvalResult, ModelCardData

    if card.licence is not None:
        licence = TeacherLicence(card.licence)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", score.suite.lower()).strip("-"),
            dataset_name=score.suite,
            metric_type=score.metric,
            metric_name=f"{score.metric} by the rule {score.rule}",
            metric_value=round(score.value, 4),
        )
        for score in card.scores
        if not score.partial
    ]
    fields: dict[str, Any] = {"tags": ["mmmamba", PAPER_TAG]}
    if results:
        fields |= {"model_name": title, "eval_results": results}
    data = ModelCardData(
        base_model=_base_model(card),
        library_name="transformers",
        pipeline_tag=task,
        license=licence.identifier,
        license_name=licence.name,
        license_link=licence.link,
        **fields,
    )
    return ["---", data.to_yaml(), "---", ""]


def _base_model(card: CardInfo) -> str | None:
    """The teacher's Hub repository: the given one, or that of its folder in the Hub's cache.

    None for a teacher with a local path: the Hub accepts no other names.
    """
    if card.base_model is not None or card.manifest is None:
        return card.base_model
    first = (*card.lineage, card.manifest)[0]
    for role in TEACHER_ROLES:
        for parent in first.parents:
            name = redact_path(parent.name).partition("@")[0]
            if parent.role == role and hub_name(parent.name) is not None:
                return name
    return None


def _distillation_note(checkpoint: Checkpoint, manifest: Manifest | None) -> list[str]:
    """A remark unless the model is known to be distilled end to end."""
    if manifest is None and LINEAR not in checkpoint.config.layer_types:
        return []
    return distillation_note(provenance_of(checkpoint) if manifest is None else manifest)


def distillation_note(known: Manifest | Provenance) -> list[str]:
    """A remark unless a model with this manifest or provenance is distilled end to end."""
    if known.final is None:
        return ["How far it was distilled is not known."]
    if known.final:
        return ["It was published as distilled end to end, which was not checked."] * (
            PUBLISHED_NOTE in known.notes
        )
    done = ", ".join(known.stages) or "none"
    return [
        "",
        "**This model was never distilled end to end**, so its answers are not those of a trained "
        f"model. Stages done: {done}.",
    ]


def _usage_section(checkpoint: Checkpoint, name: str) -> list[str]:
    if name == HUB:
        return ["## Use", "", "```python", *_usage_code(checkpoint), "```", ""]
    return [
        "## Use",
        "",
        "```python",
        "import mmmamba_cli",
        "",
        'model = mmmamba_cli.load("this folder")',
        "```",
        "",
        "or with the code its layout was published with, which `auto_map` in config.json names.",
        *_reading_notes(checkpoint, name),
        "",
    ]


def _reading_notes(checkpoint: Checkpoint, name: str) -> Iterator[str]:
    scaled = [s for s in (checkpoint.config.embedding, checkpoint.config.language) if s]
    if name == MMMAMBA_HF and any(s.rope_scaling for s in scaled):
        yield (
            "That code leaves out the RoPE scaling of the attention layers that were kept, which "
            "matters beyond the trained length only."
        )


def _usage_code(checkpoint: Checkpoint) -> list[str]:
    pictures = checkpoint.config.vision is not None
    auto = "AutoModelForImageTextToText" if pictures else "AutoModelForCausalLM"
    question = '"What is shown?", images=["picture.jpg"]' if pictures else '"Who are you?"'
    return [
        f"from transformers import {auto}, AutoProcessor",
        "",
        'folder = "this folder, or its name on the Hub"',
        f'model = {auto}.from_pretrained(folder, dtype="auto", trust_remote_code=True)',
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
        f"inputs = processor.chat({question})",
        "tokens = model.generate(**inputs, max_new_tokens=100)",
        'answer = tokens[0, inputs["input_ids"].shape[1]:]',
        "print(processor.tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _lineage_section(card: CardInfo) -> list[str]:
    if card.manifest is None:
        return []
    chain = (*card.lineage, card.manifest)
    lines = ["## Lineage", ""]
    for parent in chain[0].parents:
        if parent.role in TEACHER_ROLES:
            name = redact_path(parent.name)
            lines.append(f"- {parent.role}: {name} (`{parent.content_hash[:12]}`)")
    for manifest in chain:
        stages = ", ".join(manifest.stages) or "no stage done"
        lines.append(
            f"- {manifest.name}: {manifest.kind}, by {manifest.made_by}, {stages} "
            f"(`{manifest.content_hash[:12]}`)"
        )
    notes = [f"- note: {redact_text(note)}" for note in card.manifest.notes]
    versions = ", ".join(f"{k} {v}" for k, v in card.manifest.versions.items())
    return [*lines, *notes, *([f"- made with {versions}"] if versions else []), ""]


def _scores_section(scores: Sequence[CardScore]) -> list[str]:
    if not scores:
        return []
    beside = any(score.teacher is not None for score in scores)
    columns = ("suite", "rule", "metric", "value", *(["teacher"] if beside else []), "rows")
    lines = ["## Scores", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for score in scores:
        bounds = "" if score.low is None else f" ({score.low:.4g} to {score.high:.4g})"
        rows = f"{score.rows}, a part" if score.partial else f"{score.rows}"
        taught = "not asked" if score.teacher is None else f"{score.teacher:.4g}"
        value = f"{score.value:.4g}{bounds}"
        cells = (score.suite, score.rule, score.metric, value, *([taught] if beside else []), rows)
        lines.append(f"| {' | '.join(cells)} |")
    if any(score.low is not None for score in scores):
        lines += ["", f"In brackets: {scores[0].level:.0%} intervals, by bootstrap over the rows."]
    return [*lines, ""]


def _recipe_section(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    return ["## Recipe", "", "```yaml", *redact_recipe(manifest.recipe).splitlines(), "```", ""]
