"""What long rows take in training, and what a row divided over GPUs would send, from shapes.

    python benchmarks/activation_and_communication_bytes.py [--out FILE]

HoVLE-2.6B's shapes, one row, bf16. Nothing is measured: memory is the estimate of `mmmamba distill
--dry-run`, and the rest is counted. "Ring" is ring attention (Liu et al., arXiv 2310.01889): blocks
of keys and values go around. "All to all" is DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509):
queries, keys, values and outputs change from a share of the columns to a share of the heads. A
state is passed as in section 8.2 of Mamba-2 (Dao & Gu, arXiv 2405.21060). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmmamba_cli.architecture import LINEAR, MixerConfig, StackConfig, default_mixer, mixer_spec
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.distill.stage_memory import MicroBatchSize, estimate_memory
from mmmamba_cli.distill.stage_shapes import StageShapes, holistic_shapes
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.recipe import load_recipe

LENGTHS = (8_192, 32_768, 65_536, 131_072)
GPUS = (2, 4, 8)
BF16 = 2
GIB, MIB = 2**30, 2**20
# Bytes per second in one direction of the NVLink of an H200: half of 900 GB/s (NVIDIA data sheet).
LINK = 450e9


def student_config() -> HolisticVLMConfig:
    """The linear student of HoVLE-2.6B."""
    values = hovle.to_config(hovle.ARCHITECTURES["hovle-2.6b"]).to_dict()
    layers = len(values["layer_types"])
    mixer = default_mixer(LINEAR)
    kinds = [mixer_spec(mixer).layer_type] * layers
    return HolisticVLMConfig.from_dict({**values, "layer_types": kinds, "mixers": [mixer] * layers})


def memory(shapes: StageShapes, length: int) -> dict[str, float]:
    """GiB of each stage for a row of `length` columns; stage 3 also without recomputation."""
    found = {}
    for stage in load_recipe("mmmamba-linear").stages:
        size = MicroBatchSize(rows=1, columns=length, scored=length)
        for recomputes in (True, False) if stage.loss == "kl" else (True,):
            changes = {"checkpointing": recomputes, "accumulation": 1}
            chosen = stage.model_copy(update=changes)
            name = stage.name if recomputes else f"{stage.name}, nothing recomputed"
            found[name] = round(estimate_memory(shapes, chosen, size).total / GIB, 1)
    return found


def work(stack: StackConfig, hidden: int, length: int) -> dict[str, float]:
    """TFLOP of the forward pass of a layer: projections and MLP, and attention or the scan."""
    inner, shared = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    products = hidden * (2 * inner + 2 * shared + 3 * stack.intermediate_size)
    options = MixerConfig()
    # A multiply-add pair is two operations; attention is causal.
    return {
        "projections and MLP": round(2 * length * products / 1e12, 3),
        "attention": round(2 * length**2 * inner / 1e12, 3),
        "scan": round(
            2 * mixer_spec(default_mixer(LINEAR)).operations(stack, options, length, 0) / 1e12, 3
        ),
    }


def traffic(stack: StackConfig, length: int, gpus: int) -> dict[str, float]:
    """MiB that each GPU receives in a layer, forward and backward pass of one row.

    Backward, the gradient of a state or halo goes the other way. A ring sends keys and values
    again, with their gradients in bf16; all to all sends as much as forward, of gradients.
    """
    spec, options = mixer_spec(default_mixer(LINEAR)), MixerConfig()
    cache = spec.cache_bytes(stack, options, 1, 0, BF16)
    columns = length // gpus
    heads, shared = stack.num_heads * stack.head_dim, stack.num_kv_heads * stack.head_dim
    ring = (gpus - 1) * columns * 2 * shared * BF16
    away = (gpus - 1) / gpus * columns
    all_to_all = away * (2 * heads + 2 * shared) * BF16
    return {
        "state, from the GPU before": 2 * cache.ssm_state / MIB,
        "states of all, in one gather": 2 * (gpus - 1) * cache.ssm_state / MIB,
        "convolution's halo": 2 * cache.conv_state / MIB,
        "ring": 3 * ring / MIB,
        "all to all": 2 * all_to_all / MIB,
    }


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    config = student_config()
    shapes = holistic_shapes(config)
    # Both stacks of HoVLE have layers of the same shape.
    stack, layers = shapes.stacks[0], len(shapes.stacks)
    rows = {}
    for length in LENGTHS:
        by_gpus = {n: traffic(stack, length, n) for n in GPUS}
        rows[str(length)] = {
            "memory_gib": memory(shapes, length),
            "tflop_per_layer_forward": work(stack, config.hidden_size, length),
            "mib_per_layer": {
                str(n): {name: round(value, 3) for name, value in one.items()}
                for n, one in by_gpus.items()
            },
            "link_ms_all_layers": {
                str(n): {
                    name: round(1000 * layers * value * MIB / LINK, 3)
                    for name, value in one.items()
                }
                for n, one in by_gpus.items()
            },
        }
    result = {
        "what": "training on long rows, HoVLE-2.6B shapes, one row: estimates and counts",
        "command": " ".join(
            ["python", "benchmarks/activation_and_communication_bytes.py", *sys.argv[1:]]
        ),
        "date": time.strftime("%Y-%m-%d"),
        "device": "none: computed from shapes",
        "layers": layers,
        "link_bytes_per_second": LINK,
        "lengths": rows,
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    print(text)
    return result


if __name__ == "__main__":
    main()
