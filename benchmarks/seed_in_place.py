"""Memory and time of seeding a random Qwen3-VL of 2 B parameters, compared with copying its files.

    python benchmarks/seed_in_place.py --folder DIR [--repeats N] [--keep]

Writes 4.3 GB of bf16 in shards into DIR, reads them into the page cache, copies them (the
baseline), and runs `mmmamba seed` on them, in turn; prints JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from seed_measurement import main
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


def write_teacher(folder: Path) -> None:
    """Write random bf16 weights of the 2 B architecture."""
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


if __name__ == "__main__":
    main(
        __doc__ or "",
        "qwen3-vl-2b-random",
        "mmmamba seed of a random Qwen3-VL-2B, bf16 to bf16, --no-report, hashing included",
        write_teacher,
    )
