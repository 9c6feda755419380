"""Evaluation at HoVLE-2.6B size on one GPU: batch size 1 against the measured batch limit.

    python benchmarks/eval_full_size.py [--rows 200] [--pictures FOLDER] [--out FILE]

A random bf16 model answers a table in MME's layout through `evaluate_model`. Pictures are crops of
photographs with 1 to 12 tiles and a thumbnail; the photographs are those of matplotlib and
scikit-learn, or the .jpg files of --pictures. A random model does not end its answers, so all have
--max-new-tokens tokens. First, a few rows in fp32 must have the same answers one by one as in a
batch. The last run starts with a batch that cannot fit and is halved until it does. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gc
import io
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

import mmmamba_cli
from mmmamba_cli.architecture import is_fp32_parameter
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.evaluate import (
    EvalCallbacks,
    EvalOptions,
    ModelIdentity,
    evaluate_model,
    find_suite,
    open_suite,
)
from mmmamba_cli.evaluate.model_adapter import HolisticVLMAdapter
from mmmamba_cli.evaluate.scoring.yes_no import PERCEPTION, REASONING
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.processing import processor_from_hovle

GIB = 2**30
SUITE = "mme"
# Width and height in tiles of 448 pixels; all numbers of tiles up to 12 occur.
SHAPES = ((1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (3, 2), (2, 3), (4, 2), (3, 3), (4, 3), (3, 4))
TILE = 448
TOKENIZER = Path(__file__).parents[1] / "tests" / "processing" / "small.model"
SHIPPED = (("matplotlib", "mpl-data/sample_data"), ("sklearn", "datasets/images"))


def photographs(folder: Path | None) -> list[Path]:
    """Files of photographs: those of a folder, or of installed packages."""
    folders = [folder] if folder is not None else []
    for package, inside in SHIPPED if folder is None else ():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            folders.append(Path(spec.origin).parent / inside)
    found = sorted(file for one in folders for file in one.glob("*.jpg"))
    if not found:
        raise SystemExit("no photographs: name a folder of .jpg files with --pictures")
    return found


def write_table(file: Path, rows: int, sources: Sequence[Path]) -> int:
    """Write a table in MME's layout, two rows per picture; return the number of pictures."""
    images = [Image.open(source).convert("RGB") for source in sources]
    categories = (*PERCEPTION, *REASONING)
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "image_path", "question", "answer", "category"])
        for number in range(rows // 2):
            cell = encode(cut(images[number % len(images)], number))
            category = categories[number % len(categories)]
            for turn, answer in enumerate(("Yes", "No")):
                image = cell if turn == 0 else str(2 * number)
                question = f"Is this picture number {number + turn}? Please answer yes or no."
                path = f"{category}/{number}.jpg"
                writer.writerow([2 * number + turn, image, path, question, answer, category])
    return rows // 2


def cut(image: Image.Image, number: int) -> Image.Image:
    """A crop of a photograph; shape and position are unique to `number`."""
    columns, rows = SHAPES[number % len(SHAPES)]
    width, height = columns * TILE, rows * TILE
    share = 0.95 - 0.05 * (number // len(SHAPES) % 8)
    scale = share * min(image.width / width, image.height / height)
    box_width, box_height = scale * width, scale * height
    left = (image.width - box_width) * (number * 7 % 10) / 9
    top = (image.height - box_height) * (number * 3 % 10) / 9
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def encode(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return base64.b64encode(file.getvalue()).decode()


def random_model(raw: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> Any:
    """A random HoVLE like a loaded checkpoint, with its processor."""
    config: HolisticVLMConfig = hovle.to_config(raw)
    with torch.device("meta"):
        model = HolisticVLM(config)
    model.to_empty(device=device)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        small = is_fp32_parameter(name)
        values = torch.empty(parameter.shape, device=device).normal_(std=0.02)
        if "norm" in name:
            values += 1
        parameter.data = values.to(torch.float32 if small else dtype)
    model.tie_weights()
    assert config.vision is not None
    model.generation_config.suppress_tokens = [config.vision["image_token_id"]]
    processor = processor_from_hovle(raw, TOKENIZER)
    identity = ModelIdentity(
        name="random", content_hash=f"seed {seed}", answers_depend_on={"dtype": str(dtype)}
    )
    return HolisticVLMAdapter(model.requires_grad_(False).eval(), processor, identity)


def run(
    model: HolisticVLMAdapter, data: Path, folder: Path, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate once; return the timing and the answers."""
    said: list[str] = []
    chosen = EvalOptions(data=data, **options)
    suite = find_suite(SUITE)
    table, rows = open_suite(suite, chosen)
    gc.collect()
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = EvalCallbacks(say=said.append, warn=said.append)
    evaluate_model(model, suite, table, rows, folder, chosen, watch)
    timing = json.loads((folder / "timing.json").read_text())
    found = {
        "samples": timing["answered"],
        "seconds": timing["seconds"],
        "samples_per_second": timing["samples_per_second"],
        "batches": timing["batches"],
        "largest_batch": timing["largest_batch"],
        "halved": timing["halved"],
        "said": said,
    }
    if on_gpu:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    with (folder / "predictions.tsv").open(encoding="utf-8", newline="") as handle:
        answers = [row["prediction"] for row in csv.DictReader(handle, delimiter="\t")]
    return found, answers


def gate(raw: dict[str, Any], device: str, data: Path, folder: Path, tokens: int) -> int:
    """Check in fp32 that batched answers equal those one by one; return the number of rows."""
    # TF32 convolutions depend on the batch.
    torch.backends.cudnn.allow_tf32 = False
    model = random_model(raw, device, torch.float32, seed=0)
    options = {"limit": 8, "max_tiles": 4, "max_new_tokens": tokens}
    alone, together = (
        run(model, data, folder / f"gate-{batch}", batch=batch, **options)[1] for batch in (1, 4)
    )
    if alone != together:
        raise SystemExit(f"batched and one by one differ: {alone}, {together}")
    return len(alone)


def compare(given: argparse.Namespace, raw: dict[str, Any], device: str) -> dict[str, Any]:
    """All runs, in a temporary folder."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        pictures = write_table(folder / "MME.tsv", given.rows, photographs(given.pictures))
        checked = gate(raw, device, folder, folder, min(given.max_new_tokens, 8))
        gc.collect()
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = random_model(raw, device, dtype, seed=0)
        suite = find_suite(SUITE)
        options = {"max_tiles": given.max_tiles, "max_new_tokens": given.max_new_tokens}
        _, rows = open_suite(suite, EvalOptions(data=folder))
        found: dict[str, Any] = {}
        answers = {}
        # Warm up: kernels are selected and compiled on first use.
        run(model, folder, folder / "warm", limit=8, **options)
        for name, batch in (("batch 1", 1), ("found batch", None), ("too large", len(rows))):
            found[name], answers[name] = run(
                model, folder, folder / name.replace(" ", "-"), batch=batch, **options
            )
            print(json.dumps({name: found[name]}), flush=True)
        ratio = found["found batch"]["samples_per_second"] / found["batch 1"]["samples_per_second"]
        same = sum(a == b for a, b in zip(answers["batch 1"], answers["found batch"], strict=True))
        return {
            "pictures": pictures,
            "tiles": tile_counts(model, folder, given.max_tiles),
            "dtype": str(dtype).removeprefix("torch."),
            "gate_rows_identical_in_fp32": checked,
            "runs": found,
            "speed_ratio": round(ratio, 2),
            "same_answers_in_this_dtype": f"{same} of {len(rows)}",
            "parameters": sum(p.numel() for p in model.model.parameters()),
        }


def tile_counts(model: HolisticVLMAdapter, data: Path, max_tiles: int) -> dict[str, int]:
    """The number of rows by number of tiles, thumbnails included."""
    from mmmamba_cli.evaluate.prompts import build_eval_prompt

    suite = find_suite(SUITE)
    table, rows = open_suite(suite, EvalOptions(data=data))
    counts: Counter[int] = Counter()
    for row in rows:
        prompt = build_eval_prompt(row, suite, table, max_tiles=max_tiles, by_likelihood=False)
        counts[sum(model.encode(prompt).value.num_tiles)] += 1
    return {str(tiles): counts[tiles] for tiles in sorted(counts)}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--max-tiles", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--config", type=Path, help="config.json of a smaller HoVLE, to try it out")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    raw = hovle.ARCHITECTURES["hovle-2.6b"]
    if given.config is not None:
        raw = json.loads(given.config.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = "".join(
        f" --{name.replace('_', '-')} {getattr(given, name)}"
        for name in ("rows", "max_tiles", "max_new_tokens")
    )
    result = {
        "what": "mmmamba eval, MME layout, random HoVLE weights: batch 1 against the found batch",
        "command": f"python benchmarks/eval_full_size.py{options}",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {
            "mmmamba": mmmamba_cli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "rows": given.rows,
        "max_tiles": given.max_tiles,
        "max_new_tokens": given.max_new_tokens,
        **compare(given, raw, device),
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)
    return result


if __name__ == "__main__":
    main()
