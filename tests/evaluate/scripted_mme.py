"""Evaluations of MME with a scripted model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suite_tables import ScriptedModel

from mmmamba_cli.evaluate import (
    EvalCallbacks,
    EvalOptions,
    EvalPrompt,
    evaluate_model,
    find_suite,
    open_suite,
)

MME = find_suite("mme")


def run(
    data: Path,
    folder: Path,
    model: ScriptedModel,
    watch: EvalCallbacks | None = None,
    **options: Any,
) -> Any:
    chosen = EvalOptions(data=data, **options)
    table, rows = open_suite(MME, chosen)
    return evaluate_model(model, MME, table, rows, folder, chosen, watch or EvalCallbacks())


def right(index: str) -> str:
    return "Yes" if int(index) % 2 == 0 else "No"


def scripted(**options: Any) -> ScriptedModel:
    return ScriptedModel(lambda prompt: right(prompt.index), **options)


def of_mme(prompt: EvalPrompt) -> bool:
    return "in the image?" not in prompt.text


def mostly_right(prompt: EvalPrompt) -> str:
    """MME: right but for "Nope" to the second question of each first picture. POPE: see below."""
    number = int(prompt.index)
    if of_mme(prompt):
        return "Yes" if number % 2 == 0 else "Nope" if number % 4 == 1 else "No"
    # Four questions per split, two of them with the answer yes.
    return ("Yes", "Not sure", "No", "Yes")[number % 4]


def files(folder: Path) -> dict[str, bytes]:
    """All files except the timing."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "timing.json"}
