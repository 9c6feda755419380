"""The settings that a stage's result depends on, and how two sets of them differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmmamba_cli.data import fingerprint, open_corpus
from mmmamba_cli.errors import DataError, MmmambaWarning, RecipeError
from mmmamba_cli.recipe import Data, Recipe, Stage, parse_recipe
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
    "digests.held_out",
)
# Where data lies says nothing once its digest is known.
PLACES = ("data.train", "data.image_root")

Digests = dict[str, dict[str, str]]


def settings_of(
    recipe: Recipe, stage: Stage, parent: Manifest, digests: Digests | None = None
) -> dict[str, Any]:
    """Everything a stage's result depends on, as plain JSON; without `digests` where unknown."""
    settings: dict[str, Any] = {
        "stage": stage.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "parent": parent.content_hash,
    }
    return settings | ({"digests": digests} if digests else {})


def product_settings(product: Manifest, stage: Stage, parent: Manifest) -> dict[str, Any] | None:
    """The settings a finished stage was made with; None where its recipe does not say them."""
    try:
        recipe = parse_recipe(product.recipe, f"recipe of {product.name}")
    except RecipeError:
        return None
    made = next((made for made in recipe.stages if made.name == stage.name), None)
    return None if made is None else settings_of(recipe, made, parent, product.data)


def data_digests(data: Data) -> Digests | None:
    """Digests of the recipe's data by `train` and `held_out`; None if it cannot be opened."""
    root = None if data.image_root is None else Path(data.image_root)
    sources = {"train": data.train, "held_out": data.held_out}
    # Training opens the data itself and says what is wrong with it; a finished stage needs none.
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


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a state or product and those of today, as text.

    Data is compared by digest where both sides have one, else by its path.
    """
    before, after = _flat(_with_defaults(saved)), _flat(now)
    left_out: tuple[str, ...] = HARMLESS
    if "digests" not in saved or "digests" not in now:
        left_out += ("digests.",)
    else:
        left_out += PLACES
    return [
        _described(key, before.get(key), after.get(key), now)
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(left_out)
    ]


def same_held_out(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether held-out losses of both compare: they are of the same samples."""
    digests = [settings.get("digests", {}).get("held_out") for settings in (saved, now)]
    if None not in digests:
        return digests[0] == digests[1]
    return saved["data"].get("held_out") == now["data"].get("held_out")


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter for the result, flat; two equal ones give the same bits."""
    left_out = HARMLESS + (PLACES if "digests" in settings else ())
    return {key: value for key, value in _flat(settings).items() if not key.startswith(left_out)}


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of an older version with the defaults of fields that it did not have."""
    try:
        stage, data = Stage.model_validate(saved["stage"]), Data.model_validate(saved["data"])
    except (KeyError, ValidationError):
        return saved
    return {**saved, "stage": stage.model_dump(mode="json"), "data": data.model_dump(mode="json")}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _described(key: str, before: Any, after: Any, settings: Mapping[str, Any]) -> str:
    """The field as one would set it, `stages.stage1.lr: 0.1 -> 0.2` for `stage.lr`."""
    section, _, rest = key.partition(".")
    if section == "digests":
        what = rest.partition(".")[2]
        return f"{what} of data.train ({settings['data']['train']}) have changed"
    if section == "parent":
        return f"the product it starts from: {str(before)[:12]} -> {str(after)[:12]}"
    name = f"stages.{settings['stage']['name']}.{rest}" if section == "stage" else key
    return f"{name}: {before} -> {after}"
