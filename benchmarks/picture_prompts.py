"""Time until the first token of a prompt with pictures, at HoVLE-2.6B size on one GPU.

    python benchmarks/picture_prompts.py [--out FILE] [--columns 320 1856 3392 4096] [--repeats 10]

Random weights. Prompts of the given columns: 64 of text and the rest picture tiles, or text only if
the rest is not a whole number of tiles. Measures the linear student, hybrid-8 and the tuned
teacher, with CUDA graphs and eagerly, interleaved: medians and quartiles of host time from pixels
and ids on the device to logits on the device, and the total kernel time of a prompt (`kernels_ms`),
which the host cannot slow. Gate: the distance of graph logits from a forward pass without a cache
is at most 1.5 times that of eager logits; both are rounding, which random linear weights amplify.
On a CPU: `--random hovle-8m`, without graphs. Exits with 1 if the gate fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.inference import Generator
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.profiling import random_subjects, weight_store
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, TUNED
from mmmamba_cli.profiling.timers import device_timer
from mmmamba_cli.runs.manifest import package_versions

HYBRID = 8
ONE_BY_ONE = ", launched one by one"
ALLOWED = 1.5
# An explicit chunk size disables graphs; no prompt here is longer.
WHOLE = 1 << 14
# Text columns around a picture.
TEXT = 64

Ways = dict[str, tuple[Generator, int | None]]


def prompt(model: HolisticVLM, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids (1, T) and pixels (tiles, 3, side, side): words, a picture, words."""
    vision = model.config.vision_config
    assert vision is not None
    tiles, rest = divmod(columns - TEXT, vision.tokens_per_tile)
    text, tiles = (columns, 0) if rest else (TEXT, tiles)
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(10, 1000, (text,), generator=rng)
    picture = torch.full((tiles * vision.tokens_per_tile,), vision.image_token_id)
    side = vision.image_size
    pixels = torch.randn(tiles, vision.num_channels, side, side, generator=rng)
    ids = torch.cat((words[: text // 2], picture, words[text // 2 :])).unsqueeze(0)
    return ids.to(model.device), pixels.to(model.device, model.dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def timed(generator: Generator, ids: Tensor, pixels: Tensor, chunk: int | None) -> float:
    """Seconds of one prefill."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    generator.prefill(ids, pixels, chunk=chunk)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def measure(ways: Ways, columns: int, given: argparse.Namespace) -> Any:
    """Measure all subjects on one prompt: the gate, which also warms up, then interleaved runs."""
    found: dict[str, Any] = {}
    inputs = {}
    for name, (generator, chunk) in ways.items():
        ids, pixels = inputs[name] = prompt(generator.model, columns, given.seed)
        for _ in range(3):
            logits = generator.prefill(ids, pixels, chunk=chunk).clone()
        expected = generator.model(ids, pixels, logits_to_keep=1).logits[:, -1]
        found[name] = {"distance": distance(logits, expected)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, (generator, chunk) in ways.items():
            seconds[name].append(timed(generator, *inputs[name], chunk))
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        generator, chunk = ways[name]
        kernels = device_timer(generator.model.device).kernel_seconds(
            lambda g=generator, c=chunk, n=name: g.prefill(*inputs[n], chunk=c)
        )
        found[name] |= {
            "ms": 1e3 * middle,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "kernels_ms": None if kernels is None else 1e3 * kernels,
        }
    plain = {name: found[name + ONE_BY_ONE]["distance"] for name in ways if ONE_BY_ONE not in name}
    apart = max(found[name]["distance"] / max(other, 1e-5) for name, other in plain.items())
    tiles = len(inputs[TUNED][1])
    return {"columns": columns, "tiles": tiles, "gate": apart / ALLOWED, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--random", default="hovle-2.6b")
    parser.add_argument("--columns", type=int, nargs="+", default=[320, 1856, 3392, 4096])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    store = weight_store(given.device)
    ways: Ways = {}
    is_gpu = store.device.type == "cuda"
    for subject in random_subjects(store, given.random, (0, HYBRID), seed=given.seed):
        if subject.name != AS_SHIPPED:
            generator = Generator(subject.build().model)
            ways[subject.name] = generator, None
            ways[subject.name + ONE_BY_ONE] = generator, WHOLE
    rows = [measure(ways, columns, given) for columns in given.columns]
    result = {
        "what": "milliseconds until the logits after a prompt with pictures",
        "command": " ".join(["python", "benchmarks/picture_prompts.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if is_gpu else "CPU",
        "versions": package_versions(),
        "seed": given.seed,
        "rows": rows,
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)
    if not all(row["gate"] <= 1 for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
