"""Which changed settings are noticed when a stage resumes, or is found finished."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmmamba_cli.distill.training_settings import (
    SETTINGS_WITHOUT_EFFECT,
    diff_settings,
    result_settings,
    stage_settings,
)
from mmmamba_cli.recipe import load_recipe

PARENT: Any = SimpleNamespace(content_hash="0" * 64)
DIGESTS = {"train": {"content": "a"}, "held_out": {"content": "b"}}
# A setting of stage 3 and another value of it.
CHANGES = {
    "stages.stage3.trainable": "paper",
    "stages.stage3.steps": 7,
    "stages.stage3.learns": "new",
    "stages.stage3.kl.temperature": 2.0,
    "stages.stage3.optimiser.clip": 1.0,
    "stages.stage3.lora": {"rank": 2},
    "data.max_tiles": 3,
    "data.shuffle_seed": 3,
    "seed": 3,
}
# Changes that no result depends on; those of paths only because the digests are the same.
WITHOUT_EFFECT = {
    "stages.stage3.save_every": 7,
    "stages.stage3.checkpointing": False,
    "stages.stage3.train": "moved.jsonl",
    "data.train": "moved.jsonl",
    "data.workers": 3,
}


def settings(digests: Any, **overrides: Any) -> dict[str, Any]:
    recipe = load_recipe("smoke", overrides=overrides)
    return stage_settings(recipe, recipe.stages[2], PARENT, digests)


@pytest.mark.parametrize("digests", [None, DIGESTS])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_result_is_noticed(name: str, digests: Any) -> None:
    before, after = settings(digests), settings(digests, **{name: CHANGES[name]})
    found = diff_settings(before, after)
    assert found and all(change.startswith(name) for change in found)
    assert result_settings(before) != result_settings(after)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_other_changes_are_not(name: str) -> None:
    before, after = settings(DIGESTS), settings(DIGESTS, **{name: WITHOUT_EFFECT[name]})
    assert before != after
    assert not diff_settings(before, after)
    assert result_settings(before) == result_settings(after)


def test_the_names_of_settings_exist() -> None:
    known = {f"{section}.{key}" for section in ("stage", "data") for key in settings(None)[section]}
    listed = {name for name in SETTINGS_WITHOUT_EFFECT if not name.startswith("digests.")}
    assert listed <= known
