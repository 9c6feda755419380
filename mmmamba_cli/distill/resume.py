"""Whether a training state may be continued with the settings of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmmamba_cli.errors import RunError
from mmmamba_cli.recipe import Recipe, Stage
from mmmamba_cli.runs import Manifest

# Settings that change how a stage is computed or watched, and not what it learns.
HARMLESS = (
    "stage.accumulation",
    "stage.checkpointing",
    "stage.evaluate_every",
    "stage.save_every",
    "data.held_out",
    "data.workers",
    "data.max_bad_share",
)


def settings_of(recipe: Recipe, stage: Stage, parent: Manifest) -> dict[str, Any]:
    """Everything a stage's result depends on, as plain JSON."""
    return {
        "stage": stage.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "parent": parent.content_hash,
    }


def check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], force: bool) -> None:
    """Raise `RunError` naming what differs between a state's settings and today's."""
    before, after = _flat(saved), _flat(now)
    changed = [
        f"{_shown(key, now)}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(HARMLESS)
    ]
    if changed and not force:
        raise RunError(
            "the training state to resume was made with other settings: " + "; ".join(changed),
            "go on with these settings by --force, begin the stage anew with --overwrite, or take "
            "the old settings",
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(key: str, settings: Mapping[str, Any]) -> str:
    """The field as one would set it: `stages.stage1.lr` for `stage.lr`."""
    section, _, rest = key.partition(".")
    return f"stages.{settings['stage']['name']}.{rest}" if section == "stage" else key
