"""Helper processes of `kernels.py` that fill Triton's cache with compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("kernels.py")
MAX_PROCESSES = 8


def start(*options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, SCRIPT, *options])


def start_warming() -> list[subprocess.Popen[bytes]]:
    """Start processes that each compile a share of mamba_ssm's tilings.

    A single process takes minutes to compile all of them.
    """
    count = max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) - 2))
    return [start("--warm-mamba", f"{part}/{count}") for part in range(count)]


def wait(process: subprocess.Popen[bytes], end: float) -> None:
    try:
        process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep_share_of_tilings(part: int, count: int) -> None:
    """Restrict the autotuning of mamba_ssm's imported kernels to a share of their tilings."""
    from triton.runtime.autotuner import Autotuner

    modules = [m for name, m in sys.modules.items() if name.startswith("mamba_ssm.ops.triton")]
    found = {id(value): value for module in modules for value in vars(module).values()}
    for tuner in found.values():
        if isinstance(tuner, Autotuner):
            # Add the next tiling: a single one that does not fit this GPU is an error.
            own = tuner.configs[part::count] + tuner.configs[part + 1 :: count]
            tuner.configs = own or tuner.configs[:2]
