"""Measurements of the demo's students against their teacher, for the report.

Token agreement on held-out lessons goes to `comparisons/*.json` of the seeded run; the similarity
of every product's mixers to the teacher's attention goes to `fidelity.json` of each run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo_steps import HELD_OUT, HYBRID, LINEAR, SEEDED, UNSEEDED
from token_agreement import COMPARISONS, by_lesson, read_conversations

from mmmamba_cli.checkpoint import Checkpoint, atomic_write_text
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.manifest import utc_timestamp
from mmmamba_cli.seed.fidelity import Calibration, measure_fidelity

COMMAND = "python benchmarks/demo.py"
# Held-out conversations whose hidden states the mixers are compared on.
NUM_CONVERSATIONS = 24
FIDELITY = "fidelity.json"
NOTE = (
    f"{LINEAR} began from the teacher's attention, {LINEAR} ({UNSEEDED}) from random mixers. Both "
    "were trained on the same lessons, with the same steps and learning rates; but the output "
    "projections W_O of the unseeded student, random too, learn in stage 3, where the recipe "
    "freezes those of the seeded one."
)


def is_measured(folder: Path) -> bool:
    """Whether all files of `measure` are there."""
    files = [comparison_file(folder, name) for name in COMPARISONS]
    files += [folder / run / FIDELITY for run in (SEEDED, UNSEEDED)]
    return all(file.is_file() for file in files)


def measure(folder: Path) -> None:
    """Measure the students of both runs in the demo's folder."""
    measure_agreement(folder)
    for run in (SEEDED, UNSEEDED):
        measure_mixers(Run(folder / run), folder / HELD_OUT / "lessons.jsonl")


def comparison_file(folder: Path, name: str) -> Path:
    return folder / SEEDED / "comparisons" / f"{name}.json"


def measure_agreement(folder: Path) -> None:
    """Token agreement of each student with the teacher, by lesson."""
    unseeded = f"{LINEAR} ({UNSEEDED})"
    made = {LINEAR: (SEEDED, LINEAR), HYBRID: (SEEDED, HYBRID), unseeded: (UNSEEDED, LINEAR)}
    products = {label: Run(folder / run).open_product(name) for label, (run, name) in made.items()}
    found = by_lesson(
        Run(folder / SEEDED).open_teacher(), products, folder / HELD_OUT / "lessons.jsonl"
    )
    for name, (title, metric) in COMPARISONS.items():
        text = {
            "format": 1,
            "title": title,
            "metric": metric,
            "unit": "lesson",
            "command": COMMAND,
            "created": utc_timestamp(),
            "models": {label: shares[name] for label, shares in found.items()},
            "compare": [[LINEAR, unseeded]],
            "note": NOTE,
        }
        write_json(comparison_file(folder, name), text)


def measure_mixers(run: Run, lessons: Path) -> None:
    """Cosine similarity and relative error of each linear product's mixers, by layer.

    The inputs of a mixer are the teacher's hidden states on the first held-out conversations.
    Hybrids are left out: their restored attention is the teacher's.
    """
    teacher = run.open_teacher()
    inputs = calibration(teacher, lessons)
    products: dict[str, Any] = {}
    for name, product in run.products().items():
        if product.attention_layers:
            continue
        layers = measure_fidelity(teacher, run.open_product(name), inputs)
        products[name] = {
            "content_hash": product.content_hash,
            "layers": [vars(layer) for layer in layers],
        }
    text = {
        "format": 1,
        "inputs": f"{len(inputs.input_ids)} held-out conversations",
        "command": COMMAND,
        "created": utc_timestamp(),
        "products": products,
    }
    write_json(run.folder / FIDELITY, text)


def calibration(teacher: Checkpoint, lessons: Path) -> Calibration:
    """The first held-out conversations as one batch."""
    batch = read_conversations(teacher, lessons, NUM_CONVERSATIONS)
    return Calibration(batch.input_ids, batch.attention_mask, batch.pixel_values)


def write_json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(value, indent=1) + "\n")
