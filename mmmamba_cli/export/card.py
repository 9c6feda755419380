"""The model card: what a model is, what it came from, what it was taught and what it scored.

Nothing in it names a place on the machine it was made on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from mmmamba_cli import __version__
from mmmamba_cli.checkpoint import Checkpoint, public_name_of, released
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.export.layouts import HOVLE, HUB, RELEASED
from mmmamba_cli.model import LINEAR
from mmmamba_cli.runs import Manifest

TITLES = {
    HUB: "mmmamba's own layout, with the code that reads it",
    RELEASED: "the layout mmMamba was published in",
    HOVLE: "HoVLE's layout",
}
LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]*")
METHOD = "arxiv:2502.13145"


@dataclass(frozen=True)
class Score:
    """A suite's headline number by one rule; `low` and `high` bound it at `level`."""

    suite: str
    rule: str
    metric: str
    value: float
    rows: int
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    # Whether only the first part of the suite was asked.
    partial: bool = False


@dataclass(frozen=True)
class Story:
    """What the card tells beside the tensors; `lineage` are the product's ancestors, oldest first.

    `manifest` is None for a checkpoint that is no product. Raises `CheckpointError` for a licence
    or title that the card cannot hold.
    """

    manifest: Manifest | None = None
    lineage: tuple[Manifest, ...] = ()
    scores: tuple[Score, ...] = ()
    licence: str | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and LICENCE.fullmatch(self.licence) is None:
            raise CheckpointError(
                f"{self.licence!r} is no name of a licence", "expected one such as apache-2.0"
            )
        if self.title is not None and not self.title.isprintable():
            raise CheckpointError(f"{self.title!r} is no title", "give one line of text")


def card_text(checkpoint: Checkpoint, name: str, dtype: str, parameters: int, story: Story) -> str:
    """README.md of an export in format `name`."""
    config = checkpoint.config
    title = story.title or public_name_of(checkpoint.path) or checkpoint.path.resolve().name
    kept = config.attention_layers
    total = config.num_hidden_layers
    lines = [
        *_front_matter(checkpoint, story),
        f"# {title}",
        "",
        f"{_kind(kept, total)}. {parameters / 1e6:,.1f} M parameters in {dtype}, in "
        f"{TITLES[name]}.",
        *_honesty(checkpoint, story.manifest),
        "",
        *_use(checkpoint, name),
        *_lineage(story),
        *_scores(story.scores),
        *_recipe(story.manifest),
        f"Written by mmmamba {__version__}.",
    ]
    return "\n".join(lines) + "\n"


def public_manifest(manifest: Manifest, dtype: str, content_hash: str) -> Manifest:
    """The manifest of an exported product: paths shortened to names."""
    parents = tuple(
        parent.model_copy(update={"name": public_name(parent.name)}) for parent in manifest.parents
    )
    command = " ".join(public_name(word) for word in manifest.command.split())
    changes = {
        "parents": parents,
        "command": command,
        "dtype": dtype,
        "content_hash": content_hash,
        "recipe": public_recipe(manifest.recipe),
    }
    return manifest.model_copy(update=changes)


def public_name(text: str) -> str:
    """A path's last part, or the repository of a folder in the Hub's cache; other text as it is."""
    known = public_name_of(text)
    if known is not None:
        return known
    option, equals, value = text.partition("=")
    if equals:
        return f"{option}={public_name(value)}"
    path = PurePath(text)
    return path.name if path.is_absolute() or text.startswith((".", "~")) else text


def public_recipe(text: str) -> str:
    """A recipe without the places of teacher and data."""
    lines = []
    for line in text.splitlines():
        key, colon, value = line.partition(": ")
        lines.append(f"{key}: {public_name(value)}" if colon and _is_path(value) else line)
    return "\n".join(lines) + "\n"


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~", "./", "../"))


def _kind(kept: Sequence[int], total: int) -> str:
    if not kept:
        return f"A linear model: Mamba-2 in all {total} layers"
    if len(kept) == total:
        return f"A model with attention in all {total} layers"
    listed = ", ".join(map(str, kept))
    return f"A hybrid: attention in layers {listed} of {total}, Mamba-2 in the others"


def _front_matter(checkpoint: Checkpoint, story: Story) -> list[str]:
    pictures = checkpoint.config.vision is not None
    return [
        "---",
        *([] if story.licence is None else [f"license: {story.licence}"]),
        "library_name: transformers",
        f"pipeline_tag: {'image-text-to-text' if pictures else 'text-generation'}",
        "tags:",
        "- mmmamba",
        f"- {METHOD}",
        "---",
        "",
    ]


def _honesty(checkpoint: Checkpoint, manifest: Manifest | None) -> list[str]:
    """How far the model was distilled, where that needs saying."""
    if manifest is None and LINEAR not in checkpoint.config.layer_types:
        return []
    if manifest is None and checkpoint.model_type == released.MODEL_TYPE:
        return ["It was published as distilled end to end, which was not checked."]
    if manifest is None:
        return ["How far it was distilled is not known."]
    if manifest.final:
        return []
    done = ", ".join(manifest.stages) or "none"
    return [
        "",
        "**This model was never distilled end to end**, so its answers are not those of a trained "
        f"model. Stages done: {done}.",
    ]


def _use(checkpoint: Checkpoint, name: str) -> list[str]:
    if name == HUB:
        return ["## Use", "", "```python", *_program(checkpoint), "```", ""]
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
    if name == RELEASED and any(s.rope_scaling for s in scaled):
        yield (
            "That code leaves out the RoPE scaling of the attention layers that were kept, which "
            "matters beyond the trained length only."
        )


def _program(checkpoint: Checkpoint) -> list[str]:
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


def _lineage(story: Story) -> list[str]:
    if story.manifest is None:
        return []
    chain = (*story.lineage, story.manifest)
    lines = ["## Lineage", ""]
    for parent in chain[0].parents:
        if parent.role in ("teacher", "origin"):
            name = public_name(parent.name)
            lines.append(f"- {parent.role}: {name} (`{parent.content_hash[:12]}`)")
    for manifest in chain:
        stages = ", ".join(manifest.stages) or "no stage done"
        lines.append(
            f"- {manifest.name}: {manifest.kind}, by {manifest.made_by}, {stages} "
            f"(`{manifest.content_hash[:12]}`)"
        )
    notes = [f"- note: {note}" for note in story.manifest.notes]
    versions = ", ".join(f"{k} {v}" for k, v in story.manifest.versions.items())
    return [*lines, *notes, *([f"- made with {versions}"] if versions else []), ""]


def _scores(scores: Sequence[Score]) -> list[str]:
    if not scores:
        return []
    lines = ["## Scores", "", "| suite | rule | metric | value | rows |", "|---|---|---|---|---|"]
    for score in scores:
        bounds = "" if score.low is None else f" ({score.low:.4g} to {score.high:.4g})"
        rows = f"{score.rows}, a part" if score.partial else f"{score.rows}"
        value = f"{score.value:.4g}{bounds}"
        lines.append(f"| {score.suite} | {score.rule} | {score.metric} | {value} | {rows} |")
    if any(score.low is not None for score in scores):
        lines += ["", f"In brackets: {scores[0].level:.0%} intervals, by bootstrap over the rows."]
    return [*lines, ""]


def _recipe(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return []
    return ["## Recipe", "", "```yaml", *public_recipe(manifest.recipe).splitlines(), "```", ""]
