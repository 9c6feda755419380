"""A tiny random teacher and conversations for docs/how-to/qwen3-vl.md, as the page names them.

    PYTHONPATH=tests:tests/teachers:tests/pipeline:docs python tests/docs/tiny_qwen3_vl.py FOLDER

prepares an empty folder and runs the page's commands there, as they are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import run_page
from conversations import write_conversations
from families import FAMILIES, save_teacher
from teacher_processors import HAS_TORCHVISION

from mmmamba_cli.recipe import dump_recipe, load_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "qwen3-vl.md"
RECIPE = "qwen3-vl-hybrid"
# The page's teacher. Its processor needs torchvision; that of Idefics3 does not.
FAMILY = "qwen3_vl" if HAS_TORCHVISION else "idefics3"
LAYERS = ["layers.attention=1", "data.workers=0"]
STAGE = {"steps": 2, "batch_size": 2, "accumulation": 1, "precision": "fp32"}


def prepare(folder: Path) -> None:
    """Write the teacher, the conversations and the recipe of the page, all tiny."""
    save_teacher(FAMILIES[FAMILY], folder / "Qwen3-VL-2B-Instruct")
    for name, samples in (("train", 8), ("held_out", 4)):
        file = write_conversations(folder / "images", samples, name=name)
        file.rename(folder / file.name)
    names = [stage.name for stage in load_recipe(RECIPE).stages]
    sets = [f"stages.{name}.{field}={value}" for name in names for field, value in STAGE.items()]
    text = dump_recipe(load_recipe(RECIPE, [*LAYERS, *sets]))
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    prepare(target)
    sys.exit(run_page.run(PAGE, target))
