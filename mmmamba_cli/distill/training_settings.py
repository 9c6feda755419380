"""Settings that the result of a stage depends on: of states, of products, and their differences."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmmamba_cli.data import fingerprint, open_corpus
from mmmamba_cli.errors import DataError, MmmambaWarning, RecipeError
from mmmamba_cli.recipe import Data, Recipe, Stage, parse_recipe, stage_data
from mmmamba_cli.runs import Manifest

# Settings that change how a stage is computed or logged, but not its result.
SETTINGS_WITHOUT_EFFECT = (
    "stage.accumulation",
    "stage.checkpointing",
    "stage.evaluate_every",
    "stage.save_every",
    "data.held_out",
    "data.workers",
    "data.max_bad_share",
    "digests.held_out",
)
# Settings that define the loss of a held-out sample.
HELD_OUT_LOSS_SETTINGS = (
    "stage.loss",
    "stage.loss_scale",
    "stage.loss_weights",
    "stage.kl",
    "stage.inputs",
    "stage.layers",
    "data.max_length",
    "data.max_tiles",
)
# Ignored if the digests of the data are known.
DATA_PATH_SETTINGS = ("data.train", "data.image_root", "stage.train")

Digests = dict[str, dict[str, str]]


def stage_settings(
    recipe: Recipe, stage: Stage, parent: Manifest, digests: Digests | None = None
) -> dict[str, Any]:
    """All settings that the result of a stage depends on, as JSON; no `digests` if unknown."""
    settings: dict[str, Any] = {
        "stage": stage.model_dump(mode="json"),
        "data": stage_data(recipe.data, stage).model_dump(mode="json"),
        "seed": recipe.seed,
        "parent": parent.content_hash,
    }
    return settings | ({"digests": digests} if digests else {})


def product_settings(product: Manifest, stage: Stage, parent: Manifest) -> dict[str, Any] | None:
    """Settings that a finished stage was made with; None if its recipe lacks them."""
    try:
        recipe = parse_recipe(product.recipe, f"recipe of {product.name}")
    except RecipeError:
        return None
    made = next((made for made in recipe.stages if made.name == stage.name), None)
    return None if made is None else stage_settings(recipe, made, parent, product.data)


def stage_digests(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Digests | None]:
    """`data_digests` of each stage by its name; stages of the same data share one reading."""
    found: dict[str | None, Digests | None] = {}
    for stage in stages:
        data = stage_data(recipe.data, stage)
        if data.train not in found:
            found[data.train] = data_digests(data)
    return {stage.name: found[stage_data(recipe.data, stage).train] for stage in stages}


def data_digests(data: Data) -> Digests | None:
    """Digests of the data sets `train` and `held_out`; None if one cannot be opened."""
    root = None if data.image_root is None else Path(data.image_root)
    sources = {"train": data.train, "held_out": data.held_out}
    # Training opens the data again and reports its problems; a finished stage needs no data.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MmmambaWarning)
        try:
            return {
                name: fingerprint(open_corpus(source, root)).as_dict()
                for name, source in sources.items()
                if source is not None
            }
        except DataError:
            return None


def diff_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the settings of a state or product and the current ones.

    Data sets are compared by digest if both sides have one, else by path.
    """
    before, after = _flatten(_with_defaults(saved)), _flatten(now)
    left_out: tuple[str, ...] = SETTINGS_WITHOUT_EFFECT
    if "digests" not in saved or "digests" not in now:
        left_out += ("digests",)
    else:
        left_out += DATA_PATH_SETTINGS
    return [
        _describe_change(key, before.get(key), after.get(key), now)
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_in(key, left_out)
    ]


def same_held_out_loss(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether both compute the same loss on the same held-out samples."""
    before, after = _flatten(_with_defaults(saved)), _flatten(now)
    is_same_loss = all(
        before.get(key) == after.get(key)
        for key in before.keys() | after.keys()
        if _is_in(key, HELD_OUT_LOSS_SETTINGS)
    )
    return is_same_loss and _same_held_out_samples(saved, now)


def _same_held_out_samples(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    digests = [settings.get("digests", {}).get("held_out") for settings in (saved, now)]
    if None not in digests:
        return digests[0] == digests[1]
    return saved["data"].get("held_out") == now["data"].get("held_out")


def result_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect the result, flattened; equal settings give the same bits."""
    left_out = SETTINGS_WITHOUT_EFFECT + (DATA_PATH_SETTINGS if "digests" in settings else ())
    return {key: value for key, value in _flatten(settings).items() if not _is_in(key, left_out)}


def _is_in(key: str, settings: Sequence[str]) -> bool:
    """Whether a flattened `key` is one of the settings, or lies in one that is a section."""
    return any(key == name or key.startswith(f"{name}.") for name in settings)


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of an older version, with defaults for fields it did not have."""
    try:
        stage, data = Stage.model_validate(saved["stage"]), Data.model_validate(saved["data"])
    except (KeyError, ValidationError):
        return saved
    return {**saved, "stage": stage.model_dump(mode="json"), "data": data.model_dump(mode="json")}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _describe_change(key: str, before: Any, after: Any, settings: Mapping[str, Any]) -> str:
    """The change as a user would set it: `stages.stage1.lr: 0.1 -> 0.2` for `stage.lr`."""
    section, _, rest = key.partition(".")
    if section == "digests":
        what = rest.partition(".")[2]
        return f"{what} of data.train ({settings['data']['train']}) have changed"
    if section == "parent":
        return f"the product it starts from: {str(before)[:12]} -> {str(after)[:12]}"
    name = f"stages.{settings['stage']['name']}.{rest}" if section == "stage" else key
    return f"{name}: {before} -> {after}"
