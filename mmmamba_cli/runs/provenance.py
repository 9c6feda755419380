"""Provenance of a model (stages done, distilled end to end or not), and redaction of local paths.

A layout without a manifest keeps its provenance in a field of `config.json`, which an export writes
and `import` reads. The `redact_*` functions remove paths of this machine from published texts.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from mmmamba_cli import __version__
from mmmamba_cli.checkpoint import (
    NATIVE_MODEL_TYPE,
    AnyCheckpoint,
    Checkpoint,
    InPlaceCheckpoint,
    mmmamba_hf,
    public_model_name,
)
from mmmamba_cli.errors import CheckpointError, RecipeError
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.recipe.yaml_text import read_yaml, write_yaml
from mmmamba_cli.runs.manifest import MANIFEST, Manifest, read_manifest

WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# An absolute path in a sentence, up to the next space or quote. Excludes the slashes of a URL.
PATH_IN_TEXT = re.compile(
    r"(?<![\w:/.~\\-])(?:~?/|[A-Za-z]:\\|\.{1,2}/)[^\s'\"`,;()]*[^\s'\"`,;().:]"
)
PROVENANCE_FIELD = "mmmamba"
PUBLISHED_RECIPE = "mmmamba-linear"
PUBLISHED_NOTE = "published as distilled end to end, which was not checked here"
UNKNOWN_NOTE = "how far it was distilled is not known"


@dataclass(frozen=True)
class Provenance:
    """`stages` done, in order; `final` as in a `Manifest`, None if unknown."""

    stages: tuple[str, ...] = ()
    final: bool | None = None
    notes: tuple[str, ...] = ()


def provenance_field(provenance: Provenance) -> dict[str, Any]:
    """The value of `PROVENANCE_FIELD` in an exported config."""
    return {
        "version": __version__,
        "stages": list(provenance.stages),
        "distilled_end_to_end": provenance.final,
        "notes": list(provenance.notes),
    }


def provenance_of(checkpoint: Checkpoint) -> Provenance:
    """Read a checkpoint's provenance from its manifest, its `config.json` or its layout.

    A model in the published layout counts as published unless mmmamba exported it or it is a
    training state. Raises `RunError` for a damaged manifest and `CheckpointError` for a malformed
    field.
    """
    manifest = find_manifest(checkpoint)
    if manifest is not None:
        return Provenance(manifest.stages, manifest.final, manifest.notes)
    raw = _stored_config(checkpoint)
    if PROVENANCE_FIELD in raw:
        return _parse_field(raw[PROVENANCE_FIELD], checkpoint.path)
    if checkpoint.model_type == mmmamba_hf.MODEL_TYPE and _is_published(checkpoint):
        stages = tuple(stage.name for stage in load_recipe(PUBLISHED_RECIPE).stages)
        return Provenance(stages, True, (PUBLISHED_NOTE,))
    return Provenance(notes=(UNKNOWN_NOTE,))


def find_manifest(checkpoint: AnyCheckpoint) -> Manifest | None:
    """The manifest of a native folder or of a student of another teacher, or None."""
    folder = checkpoint.folder
    if isinstance(checkpoint, InPlaceCheckpoint):
        is_own = checkpoint.is_student
    else:
        is_own = checkpoint.model_type == NATIVE_MODEL_TYPE
    return read_manifest(folder) if is_own and (folder / MANIFEST).is_file() else None


def _stored_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The `config.json` beside the weights: a product's `raw_config` is its teacher's."""
    return (
        checkpoint.raw_config
        if checkpoint.native_config_values is None
        else checkpoint.native_config_values
    )


def _is_published(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is neither an export of mmmamba nor a training state.

    Exports older than `PROVENANCE_FIELD` name the code repository in `auto_map`. A training state
    has separate tensors for the mixer projections; the published models have them fused.
    """
    maps = _stored_config(checkpoint).get("auto_map")
    references = maps.values() if isinstance(maps, Mapping) else ()
    exported = any(str(one).startswith(f"{mmmamba_hf.CODE_REPOSITORY}--") for one in references)
    training = any(name.endswith(".attention.in_proj.weight") for name in checkpoint.source.names)
    return not exported and not training


def _parse_field(value: Any, path: Path) -> Provenance:
    fields = value if isinstance(value, Mapping) else {}
    stages, final = fields.get("stages"), fields.get("distilled_end_to_end")
    notes = fields.get("notes", [])
    texts = (stages, notes)
    if not all(isinstance(t, list) and all(isinstance(one, str) for one in t) for t in texts) or (
        final is not None and not isinstance(final, bool)
    ):
        raise CheckpointError(
            f"{path}: {PROVENANCE_FIELD} of config.json is {value!r:.80}, expected stages, "
            "distilled_end_to_end and notes as `mmmamba export` writes them",
            "take the config.json that was written with the weights, or remove the field",
        )
    return Provenance(tuple(stages or ()), final, tuple(notes))


def redact_path(text: str) -> str:
    """Shorten a path to its last part, or to its Hub id; other text is returned unchanged."""
    known = public_model_name(text)
    if known is not None:
        return known
    option, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", option):
        return f"{option}={redact_path(value)}"
    if WINDOWS_PATH.match(text):
        return PureWindowsPath(text).name or text
    if PurePath(text).is_absolute() or text.startswith((".", "~")):
        return PurePath(text).name or text
    return text


def redact_text(text: str) -> str:
    """Shorten every path in a sentence to its last part."""
    if "\n" not in text and _is_path(text):
        return redact_path(text)
    return PATH_IN_TEXT.sub(lambda found: redact_path(found[0]), text)


def redact_value(value: Any, shorten: Callable[[str], str] | None = None) -> Any:
    """Copy JSON or YAML data with `shorten` applied to every string.

    By default only strings that are a path as a whole are shortened: other texts, for example chat
    templates, contain slashes too.
    """
    if isinstance(value, str):
        return _redact_whole_path(value) if shorten is None else shorten(value)
    if isinstance(value, dict):
        return {key: redact_value(inner, shorten) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(inner, shorten) for inner in value]
    return value


def _redact_whole_path(text: str) -> str:
    return redact_path(text) if "\n" not in text and _is_path(text) else text


def redact_command(command: str) -> str:
    """Shorten every path in a command line; the result is quoted for a shell."""
    try:
        words = shlex.split(command)
    except ValueError:
        # Older versions stored commands without quotes.
        words = command.split()
    return shlex.join(redact_path(word) for word in words)


def redact_recipe(text: str) -> str:
    """Shorten every path in a recipe, and write it in the standard form of recipes."""
    try:
        return write_yaml(redact_value(read_yaml(text, "the recipe"), redact_text))
    except (RecipeError, RecursionError):
        # Not valid recipe YAML: shorten paths in the plain text.
        return redact_text(text)


def _is_path(text: str) -> bool:
    return bool(WINDOWS_PATH.match(text)) or text.startswith(("/", "~/", "./", "../"))
