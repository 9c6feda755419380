"""Compare the tokens of the fast decoder with those of the model's forward pass.

    python benchmarks/same_tokens.py MODEL... [--device D] [--prompts N] [--int8] [--out FILE]

MODEL is a checkpoint's folder or the name of a shipped model. The prompts are questions of the
`scenes` suite with their pictures, and secret words in long texts, in batches of one to eight rows.
Answers have `--tokens` tokens; end-of-sequence tokens are ignored. In fp32 all tokens must be
equal. In bf16 the two paths round differently: each first difference must be at a token whose two
largest reference logits are at most 2 % of the logit range apart. Tokens after the first difference
of a row are not compared.

Prints one JSON object, and exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import load_model
from mmmamba_cli.devices import pick_device
from mmmamba_cli.inference import Generator, quantize
from mmmamba_cli.model import HolisticVLM, new_cache
from mmmamba_cli.plugins import load_reference
from mmmamba_cli.processing import HolisticTextProcessor
from mmmamba_cli.runs import open_processor, resolve_path
from mmmamba_cli.runs.manifest import package_versions

PROMPTS, NEW_TOKENS = 200, 24
# Every fourth prompt is a text with this range of sentences: about 70 to 6000 tokens.
TEXT_EVERY, SENTENCES = 4, (5, 20, 60, 150, 400)
ROWS = (1, 2, 1, 4, 1, 8, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative to the range of the reference's logits.
NEAR = 0.02
SCENES = "mmmamba_evals.scenes"

Batch = dict[str, Tensor]


def questions(count: int, seed: int, pictures: bool) -> Iterator[tuple[str, list[Any]]]:
    """(text, pictures) of `count` prompts, cycling over the suite's categories."""
    shipped = load_reference(f"{SCENES}.shipped:shipped_atlas")()
    fonts = load_reference(f"{SCENES}.fonts:fonts_of")(load_reference(f"{SCENES}.fonts:SEEN"))
    world = load_reference(f"{SCENES}.world:make_world")(shipped, fonts)
    render = load_reference(f"{SCENES}.render:render")
    draw_text = load_reference(f"{SCENES}.long:draw_text")
    suite_seed = load_reference(f"{SCENES}.shipped:TEST_SEED")
    scenes = list(load_reference(f"{SCENES}.build:draw_suite")(world, suite_seed))
    rng = random.Random(seed)
    rng.shuffle(scenes)
    for number in range(count):
        if number % TEXT_EVERY == 0 or not pictures:
            length = SENTENCES[number // TEXT_EVERY % len(SENTENCES)]
            text, (asked, _), _ = draw_text(random.Random(f"{seed} {number}"), world, length)
            yield f"{text}\n{asked.text}", []
        else:
            _, (scene, many) = scenes[number % len(scenes)]
            yield f"<image>\n{rng.choice(many).text}", [render(scene, shipped)]


def batches(model: HolisticVLM, processor: Any, count: int, seed: int) -> list[Batch]:
    """Left-padded model inputs of the prompts, on the model's device."""
    pictures = not isinstance(processor, HolisticTextProcessor)
    asked = list(questions(count, seed, pictures))
    found = []
    while asked:
        rows = ROWS[len(found) % len(ROWS)]
        texts = [text for text, _ in asked[:rows]]
        images = [shown for _, shown in asked[:rows]]
        made = processor.chat(texts, images) if pictures else processor.chat(texts)
        found.append({name: tensor.to(model.device) for name, tensor in made.items()})
        asked = asked[rows:]
    return found


@torch.no_grad()
def reference(model: HolisticVLM, batch: Batch, tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, N) of the model's forward, and the gap of the two top logits, (B, N).

    The gap is relative to the range of all selectable logits.
    """
    cache = new_cache(model.config)
    unwanted = model.generation_config.suppress_tokens or []
    mask, found, gaps = batch["attention_mask"], [], []
    logits = model(**batch, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for count in range(tokens):
        scores = logits.float()
        lowest = scores.amin(-1)
        scores[:, unwanted] = float("-inf")
        (first, second), token = scores.topk(2).values.unbind(-1), scores.argmax(-1)
        found.append(token)
        gaps.append((first - second) / (first - lowest))
        if count + 1 < tokens:
            mask = torch.cat((mask, mask.new_ones(len(token), 1)), dim=1)
            output = model(token.unsqueeze(1), attention_mask=mask, past_key_values=cache)
            logits = output.logits[:, -1]
    return torch.stack(found, dim=1), torch.stack(gaps, dim=1)


def compare(model: HolisticVLM, made: list[Batch], tokens: int) -> dict[str, Any]:
    """Run both paths over all prompts: the rows that differ, and where."""
    generator = Generator(model)
    seconds = {"reference": 0.0, "fast": 0.0}
    compared, differences = 0, []
    for number, batch in enumerate(made):
        batch = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in batch.items()}
        begin = time.perf_counter()
        expected, gaps = reference(model, batch, tokens)
        expected, gaps = expected.cpu(), gaps.cpu()
        middle = time.perf_counter()
        found = generator.generate(**batch, max_new_tokens=tokens, eos=()).cpu()
        seconds["reference"] += middle - begin
        seconds["fast"] += time.perf_counter() - middle
        for row, same in enumerate(found == expected):
            if bool(same.all()):
                compared += tokens
                continue
            first = int((~same).int().argmax())
            compared += first + 1
            where = {"batch": number, "row": row, "token": first}
            differences.append({**where, "gap": float(gaps[row, first])})
    return {
        "prompts": sum(len(batch["input_ids"]) for batch in made),
        "longest_prompt": max(batch["input_ids"].shape[1] for batch in made),
        "tokens_compared": compared,
        "rows_that_differ": len(differences),
        "of_them_not_near": sum(found["gap"] > NEAR for found in differences),
        "largest_gap": max((found["gap"] for found in differences), default=None),
        "differences": differences,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def examine(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Check one model in both dtypes."""
    path = Path(name)
    named = resolve_path(path)
    processor = open_processor(named.checkpoint)
    if processor is None:
        raise SystemExit(f"{name} has no tokenizer, so it cannot be asked anything")
    device = pick_device(given.device)
    result: dict[str, Any] = {"kind": named.kind, "dtypes": {}}
    made: list[Batch] = []
    for label in given.dtypes:
        dtype = DTYPES[label]
        model = load_model(
            path, device=device, dtype=dtype, frozen=True, checkpoint=named.checkpoint
        )
        if given.int8:
            quantize(model)
        made = made or batches(model, processor, given.prompts, given.seed)
        found = result["dtypes"][label] = compare(model, made, given.tokens)
        failed = found["rows_that_differ" if label == "fp32" else "of_them_not_near"]
        found["holds"] = failed == 0
        print(name, label, {k: v for k, v in found.items() if k != "differences"}, file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--device")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--int8", action="store_true", help="both paths with int8 weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = pick_device(given.device)
    is_gpu = device.type == "cuda"
    result = {
        "what": "greedy tokens of the fast path against those of the model's forward pass",
        "command": " ".join(["python", "benchmarks/same_tokens.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if is_gpu else "CPU",
        "versions": package_versions(),
        "seed": given.seed,
        "near": NEAR,
        "models": {name: examine(name, given) for name in given.models},
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)
    found = [part for model in result["models"].values() for part in model["dtypes"].values()]
    if not all(part["holds"] for part in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
