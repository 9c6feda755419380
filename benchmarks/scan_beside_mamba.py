"""Forward and backward of the scan against mamba_ssm, interleaved in one process on one GPU.

    python benchmarks/scan_beside_mamba.py [--out FILE] [--no-gate]

The quick part of `kernels.py`. Both are checked against fp64 first, unless `--no-gate` is given.
mamba_ssm's autotuning takes minutes if Triton has not compiled its kernels yet;
`kernels.py --warm-mamba 0/1` compiles them ahead. Keys and values are repeated to all heads for
mamba_ssm beforehand, which is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_problems import Place, Problem, mamba_scan, scan
from kernels import TOLERANCE, both, gate, milliseconds, packages, replayed, sets


def timed(problem: Problem, backend: str, gated: bool) -> dict[str, Any]:
    """Median milliseconds of host time and of a CUDA graph; the largest relative error."""
    whole, asked = {
        "triton": (scan("triton"), scan("triton")),
        "mamba_ssm": (mamba_scan, partial(mamba_scan, state=False)),
    }[backend]
    worst = max(gate(problem, whole, backend).values()) if gated else None
    inputs, run = sets(problem, backend, True), both(asked)
    found = {"ms": statistics.median(milliseconds(run, inputs)), "graph_ms": replayed(run, inputs)}
    return {**found, "worst_error": worst}


def compared(problem: Problem, gated: bool) -> dict[str, Any]:
    theirs, ours = (timed(problem, name, gated) for name in ("mamba_ssm", "triton"))
    faster = {kind: round(theirs[kind] / ours[kind], 3) for kind in ("ms", "graph_ms")}
    return {"rows x tokens": problem.name, "mamba_ssm": theirs, "triton": ours, "faster": faster}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-gate", action="store_true")
    given = parser.parse_args()
    place = Place(False)
    result: dict[str, Any] = {
        "what": "forward and backward of one mixer's scan, 16 heads of 128, bf16",
        "command": "python benchmarks/scan_beside_mamba.py" + " --no-gate" * given.no_gate,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(),
        "versions": packages(),
        "seed": 0,
        "tolerance": TOLERANCE[place.dtype],
        "rows": [],
    }
    for problem in place.problems():
        if problem.op == "ssd" and problem.trains:
            result["rows"].append(compared(problem, not given.no_gate))
            print(json.dumps(result["rows"][-1]), flush=True)
            if given.out:
                given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
