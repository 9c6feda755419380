"""What `seed_full_size.py` and `seed_in_place.py` measure: copying a teacher, and seeding of it.

Copy and seed alternate, so that both meet the same machine; medians are compared. Peak anonymous
memory is the largest RssAnon of the process, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

# A virtual machine hands memory that became free back to its host within seconds, and gets it back
# at a cost. Without a pause the copy finds the pages of the files that were just deleted, and the
# seed, which first imports its libraries, does not.
PAUSE_SECONDS = 8


def read_all(folder: Path) -> None:
    """Read the weights into the page cache."""
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


def seed(source: Path, run: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak anonymous bytes of the command; the run is removed."""
    command = [sys.executable, "-m", "mmmamba_cli", "seed", str(source), "--no-report"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--run", str(run)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(run)
    return {
        "seconds": seconds,
        "user_cpu_seconds": after.ru_utime - before.ru_utime,
        "system_cpu_seconds": after.ru_stime - before.ru_stime,
        "peak_anonymous_bytes": peak,
    }


def measure(source: Path, work: Path, repeats: int) -> dict[str, Any]:
    """Copy and seed `source` in turn, `repeats` times."""
    read_all(source)
    copies, seeds, loads = [], [], []
    for _ in range(repeats):
        loads.append(os.getloadavg()[0])
        time.sleep(PAUSE_SECONDS)
        copies.append(copy_seconds(source, work / "copy"))
        time.sleep(PAUSE_SECONDS)
        seeds.append(seed(source, work / "run"))
    return {
        "load_averages": loads,
        "copy_seconds": copies,
        "seed_seconds": [one["seconds"] for one in seeds],
        "seed_user_cpu_seconds": [one["user_cpu_seconds"] for one in seeds],
        "seed_system_cpu_seconds": [one["system_cpu_seconds"] for one in seeds],
        "seconds_over_copy": median(one["seconds"] for one in seeds) / median(copies),
        "peak_anonymous_bytes": max(one["peak_anonymous_bytes"] for one in seeds),
    }


def main(description: str, name: str, what: str, write_teacher: Callable[[Path], None]) -> None:
    """Write the teacher `name` into --folder, measure, and print JSON.

    A folder that --keep left is used again.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are")
    given = parser.parse_args()
    source = given.folder / name
    if not source.exists():
        write_teacher(source)
    shards = list(source.glob("*.safetensors"))
    result = {
        "what": what,
        "command": f"python benchmarks/{Path(sys.argv[0]).name} --folder DIR",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "teacher_bytes": sum(shard.stat().st_size for shard in shards),
        "shards": len(shards),
        **measure(source, given.folder, given.repeats),
    }
    print(json.dumps(result, indent=2))
    if not given.keep:
        shutil.rmtree(given.folder)
