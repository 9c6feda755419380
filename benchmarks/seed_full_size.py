"""Memory and time of seeding a random HoVLE of 2.6 B parameters, compared with copying its files.

    python benchmarks/seed_full_size.py --folder DIR [--keep]

Writes 10.4 GB of fp32 in three shards into DIR, reads them into the page cache, copies them (the
baseline), and runs `mmmamba seed` on them; prints JSON. Peak anonymous memory is the largest
RssAnon of the process, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmmamba_cli.checkpoint import ShardedWriter, TensorInfo, hovle

SHARD_BYTES = 4_000_000_000


def write_teacher(folder: Path) -> int:
    """Random fp32 weights of the 2.6 B architecture; returns their bytes."""
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
    return sum(info.nbytes for info in plan.values())


def read_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            while handle.read(1 << 24):
                pass


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds until a copy is on disk, as the files of a product are."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def anonymous_bytes(pid: int) -> int:
    """RssAnon of the command; 0 before the new process runs it, when it has this one's memory."""
    try:
        if b"mmmamba_cli" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return 0
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")), 0)


def seed(source: Path, run: Path) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of the command."""
    command = [sys.executable, "-m", "mmmamba_cli", "seed", str(source), "--no-report"]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--run", str(run)])
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are")
    given = parser.parse_args()
    source = given.folder / "hovle-2.6b-random"
    nbytes = write_teacher(source)
    read_all(source)
    copies = [copy_seconds(source, given.folder / "copy") for _ in range(2)]
    read_all(source)
    seconds, peak = seed(source, given.folder / "run")
    result = {
        "what": "mmmamba seed of a random HoVLE-2.6B, fp32 to bf16, --no-report, hashing included",
        "command": "python benchmarks/seed_full_size.py --folder DIR",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seed": 0,
        "teacher_bytes": nbytes,
        "shards": len(list(source.glob("*.safetensors"))),
        "copy_seconds": copies,
        "seed_seconds": seconds,
        "seconds_over_copy": seconds / min(copies),
        "peak_anonymous_bytes": peak,
    }
    print(json.dumps(result, indent=2))
    if not given.keep:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
