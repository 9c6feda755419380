"""A small plan, and the rows of its suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from suite_tables import picture

# Writes the plan with changes of its top-level keys; returns the file.
WritePlan = Callable[..., Path]

PLAN: dict[str, Any] = {
    "teacher": "{folder}/hovle.ckpt",
    "recipe": "smoke",
    "dtype": "fp32",
    "data": "{folder}/train.jsonl",
    "held_out": "{folder}/held_out.jsonl",
    "image_root": "{folder}",
    "set": {"layers.attention": 0, "data.max_length": 400},
    "suites": [{"name": "scenes", "data": "{folder}", "max_new_tokens": 2, "batch": 12}],
    "seeds": [0],
    "base": "linear",
    "arms": [
        {"name": "linear"},
        {"name": "hybrid", "set": {"layers.attention": 1}},
        {"name": "early", "stages": ["stage1", "stage2"]},
    ],
}


def suite_rows() -> list[dict[str, Any]]:
    """Two categories of three pictures with two questions each."""
    return [
        {
            "index": 2 * number + turn,
            "image": picture(number, (40, 40)),
            "image_path": f"{number}.png",
            "question": f"Is it {turn}?",
            "answer": ("Yes", "No")[turn],
            "category": ("count", "colour")[number % 2],
        }
        for number in range(6)
        for turn in range(2)
    ]
