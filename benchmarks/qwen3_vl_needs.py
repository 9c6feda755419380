"""Memory and disk of distilling Qwen3-VL of 2, 4 and 8 B parameters, from their shapes alone.

    python benchmarks/qwen3_vl_needs.py [--recipe qwen3-vl-hybrid] [--out FILE]

The numbers are those of `mmmamba distill --dry-run`, without weights and without data: a process
has the largest micro batch of rows of the recipe's max_length, each with `ANSWERS` answer tokens.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from seed_in_place import TEXT, VISION

import mmmamba_cli
from mmmamba_cli.distill.micro_batches import rows_at_most
from mmmamba_cli.distill.stage_disk import estimate_disk, peak_disk, product_bytes
from mmmamba_cli.distill.stage_memory import MicroBatchSize, estimate_memory
from mmmamba_cli.distill.stage_shapes import StageShapes, in_place_shapes, trained_before
from mmmamba_cli.recipe import Recipe, load_recipe, place_attention, stage_data
from mmmamba_cli.teachers import StudentPlan, student_config

ANSWERS = 512
BF16_BYTES = 2
# From the published config.json of Qwen/Qwen3-VL-4B-Instruct and -8B-Instruct, where they differ
# from that of 2 B. Attention stays in a quarter of the text layers.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2B": ({}, {}),
    "4B": (
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
        {"out_hidden_size": 2560},
    ),
    "8B": (
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    ),
}


def linear_student(text: dict[str, Any], vision: dict[str, Any]) -> StageShapes:
    """The shapes of a student with Mamba-2 in every text layer."""
    text = TEXT | text
    config = transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=VISION | vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype=torch.bfloat16,
    )
    return in_place_shapes(student_config(config, StudentPlan.of_layers(text["num_hidden_layers"])))


def needs(linear: StageShapes, recipe: Recipe) -> dict[str, Any]:
    """Memory and disk of each stage of a recipe, a quarter of the layers attention."""
    layers = len(linear.stacks)
    kept = recipe.layers.attention and layers // 4
    hybrid = linear.with_attention(place_attention(recipe.layers.placement, kept, layers))
    stages, disks = {}, []
    for stage in recipe.stages:
        shapes = hybrid if stage.layers == "planned" else linear
        length = stage.max_length or stage_data(recipe.data, stage).max_length
        rows = rows_at_most(stage, length, processes=1)
        size = MicroBatchSize(rows, length, rows * ANSWERS)
        memory = estimate_memory(shapes, stage, size, trained_before(recipe, stage, shapes))
        disk = estimate_disk(shapes, stage, BF16_BYTES, has_held_out=True)
        disks.append(disk)
        stages[stage.name] = {
            "micro_batch_rows": rows,
            "memory": {**asdict(memory), "total": memory.total},
            "disk": asdict(disk),
        }
    seed = product_bytes(linear, BF16_BYTES)
    between = product_bytes(hybrid, BF16_BYTES) if kept else 0
    return {
        "teacher_parameters": sum(map(prod, linear.teacher.values())),
        "layers": layers,
        "attention_layers": kept,
        "stages": stages,
        "seed_bytes": seed,
        "disk_peak_bytes": seed + between + peak_disk(disks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="qwen3-vl-hybrid")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    found = {
        "what": "estimates of distill --dry-run from shapes alone, no weights, no data",
        "command": f"python benchmarks/qwen3_vl_needs.py --recipe {given.recipe}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": "none: nothing runs",
        "versions": {
            "mmmamba": mmmamba_cli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": None,
        "recipe": given.recipe,
        "answer_tokens_a_row": ANSWERS,
        "models": {name: needs(linear_student(*sizes), recipe) for name, sizes in SIZES.items()},
    }
    text = json.dumps(found, indent=2) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
