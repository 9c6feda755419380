"""Memory and time of seeding a random Qwen3-VL of 2 B parameters, compared with copying its files.

    python benchmarks/seed_in_place.py --folder DIR [--keep]

Writes 4.3 GB of bf16 in shards into DIR, reads them into the page cache, copies them (the
baseline), and runs `mmmamba seed` on them; prints JSON. Peak anonymous memory is the largest
RssAnon of the process, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from seed_full_size import copy_seconds, read_all, seed
from transformers.initialization import no_init_weights

from mmmamba_cli.checkpoint import ShardedWriter, TensorInfo

SHARD_BYTES = 2_000_000_000
# The sizes of Qwen/Qwen3-VL-2B-Instruct, from its published config.json.
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}


def write_teacher(folder: Path) -> int:
    """Random bf16 weights of the 2 B architecture; returns their bytes."""
    config = transformers.Qwen3VLConfig(
        text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, dtype=torch.bfloat16
    )
    with no_init_weights(), torch.device("meta"):
        model: Any = transformers.Qwen3VLForConditionalGeneration(config)
    plan = {
        name: TensorInfo.of(torch.bfloat16, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    with ShardedWriter(folder, plan, SHARD_BYTES) as writer:
        for name, info in plan.items():
            values = torch.empty(info.shape).uniform_(-0.05, 0.05, generator=rng)
            writer.write(name, values.bfloat16())
    config.save_pretrained(folder)
    return sum(info.nbytes for info in plan.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are")
    given = parser.parse_args()
    source = given.folder / "qwen3-vl-2b-random"
    nbytes = write_teacher(source)
    read_all(source)
    copies = [copy_seconds(source, given.folder / "copy") for _ in range(2)]
    read_all(source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = seed(source, given.folder / "run")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "what": "mmmamba seed of a random Qwen3-VL-2B, bf16 to bf16, --no-report, hashing included",
        "command": "python benchmarks/seed_in_place.py --folder DIR",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "teacher_bytes": nbytes,
        "shards": len(list(source.glob("*.safetensors"))),
        "copy_seconds": copies,
        "seed_seconds": seconds,
        "seed_user_cpu_seconds": after.ru_utime - before.ru_utime,
        "seed_system_cpu_seconds": after.ru_stime - before.ru_stime,
        "seconds_over_copy": seconds / min(copies),
        "peak_anonymous_bytes": peak,
    }
    print(json.dumps(result, indent=2))
    if not given.keep:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
