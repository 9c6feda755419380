"""`eval --suite scenes` decoded by transformers and by `Generator`, in one process.

    python benchmarks/eval_decoding.py [--rows 448] [--device cuda] [--out FILE]

Each shipped model answers the same questions by each decoder, alternating, in fp32 and, on a GPU,
also in bf16. The first pass of each decoder compiles and captures, and is reported separately.
Answers are compared with those of transformers in the same dtype. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import mmmamba_cli
from mmmamba_cli.evaluate import EvalOptions, find_suite, open_suite
from mmmamba_cli.evaluate.batching import BatchLimit, plan_batches
from mmmamba_cli.evaluate.model_adapter import HolisticVLMAdapter, load_eval_model
from mmmamba_cli.evaluate.prompts import build_eval_prompt
from mmmamba_cli.inference import Generator
from mmmamba_cli.runs import resolve_path

MODELS = ("scenes-linear", "scenes-hybrid", "scenes-teacher")
SUITE = "scenes"
BATCH, REPEATS = 64, 2


def encoded_questions(model: HolisticVLMAdapter, rows: int) -> list[list[Any]]:
    """Questions of the suite, encoded, in the batches that `mmmamba eval` would ask."""
    suite = find_suite(SUITE)
    table, found = open_suite(suite, EvalOptions(limit=rows))
    prompts = [
        build_eval_prompt(row, suite, table, max_tiles=6, by_likelihood=False) for row in found
    ]
    encoded = [model.encode(prompt) for prompt in prompts]
    batches = plan_batches([one.length for one in encoded], BatchLimit(BATCH))
    return [[encoded[place] for place in batch] for batch in batches]


def answer(model: HolisticVLMAdapter, batches: list[list[Any]]) -> tuple[list[str], float]:
    tokens = find_suite(SUITE).max_new_tokens
    start = time.perf_counter()
    answers = [text for batch in batches for text in model.generate(batch, tokens)]
    return answers, time.perf_counter() - start


def compare(name: str, device: str, dtype: str, rows: int) -> dict[str, Any]:
    model = load_eval_model(resolve_path(Path(name)), device, dtype)
    batches = encoded_questions(model, rows)
    decoders: dict[str, Generator | None] = {"transformers": None, "generator": model.generator}
    if device == "cuda":
        decoders["generator without graphs"] = Generator(model.model, graphs=False)
    seconds: dict[str, list[float]] = {decoder: [] for decoder in decoders}
    answers: dict[str, list[str]] = {}
    for _ in range(REPEATS + 1):
        for decoder, generator in decoders.items():
            model.__dict__["generator"] = generator
            answers[decoder], spent = answer(model, batches)
            seconds[decoder].append(round(spent, 3))
    reference = answers["transformers"]
    return {
        "model": name,
        "dtype": dtype,
        "questions": len(reference),
        "batches": len(batches),
        "seconds": {
            decoder: {"first": spent[0], "best": min(spent[1:])}
            for decoder, spent in seconds.items()
        },
        "different_answers": {
            decoder: sum(a != b for a, b in zip(found, reference, strict=True))
            for decoder, found in answers.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=448, help="questions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    given = parser.parse_args()
    dtypes = ("fp32", "bf16") if given.device == "cuda" else ("fp32",)
    found = {
        "command": "python benchmarks/eval_decoding.py",
        "created": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name()
        if given.device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {
            "mmmamba": mmmamba_cli.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "batch": BATCH,
        "results": [
            compare(name, given.device, dtype, given.rows) for dtype in dtypes for name in MODELS
        ],
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
