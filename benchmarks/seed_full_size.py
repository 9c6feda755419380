"""Memory and time of seeding a random HoVLE of 2.6 B parameters, compared with copying its files.

    python benchmarks/seed_full_size.py --folder DIR [--repeats N] [--keep]

Writes 10.4 GB of fp32 in three shards into DIR, reads them into the page cache, copies them (the
baseline), and runs `mmmamba seed` on them, in turn; prints JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from seed_measurement import main

from mmmamba_cli.checkpoint import ShardedWriter, TensorInfo, hovle

SHARD_BYTES = 4_000_000_000


def write_teacher(folder: Path) -> None:
    """Write random fp32 weights of the 2.6 B architecture."""
    raw = hovle.ARCHITECTURES["hovle-2.6b"]
    name_map = hovle.name_map(raw, hovle.to_config(raw))
    plan = {
        name: TensorInfo.of(torch.float32, shape)
        for mapping in name_map
        for name, shape in mapping.foreign.items()
    }
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    with ShardedWriter(folder, plan, SHARD_BYTES) as writer:
        for name, info in plan.items():
            writer.write(name, torch.empty(info.shape).uniform_(-0.05, 0.05, generator=rng))
    (folder / "config.json").write_text(json.dumps(raw))


if __name__ == "__main__":
    main(
        __doc__ or "",
        "hovle-2.6b-random",
        "mmmamba seed of a random HoVLE-2.6B, fp32 to bf16, --no-report, hashing included",
        write_teacher,
    )
