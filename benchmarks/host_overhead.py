"""CPU time of the host for the layers of a distillation step, without a GPU.

    python benchmarks/host_overhead.py [--before CHECKOUT] [--turns 5] [--out FILE]

HoVLE-2.6B's layers with tiny widths and 16 tokens, in bf16 on the CPU, one thread: nearly all of
the time is Python and PyTorch's dispatcher. The launchers of the Triton kernels run as on a GPU,
but the launches themselves (Triton's binder and the driver) are left out. The result is a proxy: it
shows what a change of the host's code brings, not the time of a step on a GPU. With --before,
processes of an older checkout and of this one take turns. Microseconds of CPU time per layer and
micro batch: the least of several repeats in a process, and the median over processes. Triton has to
be installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from distill_full_size import make_pair, text_batch
from random_stages import environment, shapes

from mmmamba_cli.architecture import LINEAR, default_mixer
from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.recipe import load_recipe

STAGES = ("stage1", "stage2", "stage3")
LAUNCHERS = ("ssd.fused", "ssd.backward", "conv.fused", "norm.fused")
TOKENS, MICRO_BATCHES, REPEATS = 16, 2, 6
# Chunks of one token: as many chunks as in a long text.
CHUNK = 1


class NoKernels:
    """A kernel module whose launches do nothing."""

    def __getattr__(self, name: str) -> NoKernels:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: None


def use_launchers_on_cpu() -> None:
    """Let `auto` pick the Triton backends on the CPU, without launches."""

    def supports(*tensors: Any) -> bool:
        given = [tensor for tensor in tensors if tensor is not None]
        return not any(tensor.is_cuda or tensor.dtype == torch.float64 for tensor in given)

    ops = "mmmamba_cli.ops"
    for name in ("backends", "dispatch", "conv", "norm"):
        importlib.import_module(f"{ops}.{name}").supports_triton = supports  # type: ignore[attr-defined]
    # No self-test: outputs are arbitrary.
    importlib.import_module(f"{ops}.dispatch")._failure = lambda *test: None  # type: ignore[attr-defined]
    for name in LAUNCHERS:
        module: Any = importlib.import_module(f"{ops}.{name}")
        module.kernels = NoKernels()
        module.check_inputs = lambda op, *tensors: None
    tuning = importlib.import_module(f"{ops}.ssd.launch_config").TUNING
    tuning.update({dtype: one._replace(chunk=CHUNK) for dtype, one in tuning.items()})


def measure(stage_name: str) -> float:
    """Microseconds per layer and micro batch of one stage."""
    stage = next(one for one in load_recipe("mmmamba-linear").stages if one.name == stage_name)
    raw = shapes(tiny=True)
    raw["embedding_config"] |= {"num_hidden_layers": 8, "llm_vocab_size": 4096}
    raw["llm_config"] |= {"num_hidden_layers": 24, "vocab_size": 4096}
    pair = make_pair(raw, stage, default_mixer(LINEAR), "cpu", "bf16")
    parameters = pair.trainable_parameters().values()
    for parameter in parameters:
        parameter.requires_grad_()
    pair.checkpoint_layers(0)
    objective = build_objective(stage, pair.student.config, pair.trainable)
    batch = text_batch(TOKENS, 4096, "cpu")
    weights = objective.term_weights(objective.count_units(pair, batch))
    pair.student.train()
    seconds = []
    for _ in range(REPEATS):
        gc.collect()
        began = time.thread_time()
        for _ in range(MICRO_BATCHES):
            objective.loss_sums(pair, batch, weights)
        seconds.append(time.thread_time() - began)
        for parameter in parameters:
            parameter.grad = None
    return 1e6 * min(seconds[1:]) / MICRO_BATCHES / len(pair.mixers)


def measure_checkout(root: Path) -> dict[str, float]:
    """All stages in a process that imports the package of a checkout."""
    paths = [str(root), str(root / "benchmarks"), *sys.path[1:]]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    # -P: the other benchmarks are those of the checkout.
    command = [sys.executable, "-P", __file__, "--here"]
    done = subprocess.run(
        command, env=settings, cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.here:
        torch.set_num_threads(1)
        # oneDNN compiles products of bf16 for each shape.
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        use_launchers_on_cpu()
        print(json.dumps({name: measure(name) for name in STAGES}))
        return
    sides = {"after": Path(__file__).resolve().parents[1]}
    if given.before is not None:
        sides = {"before": given.before.resolve(), **sides}
    turns = [
        {side: measure_checkout(root) for side, root in sides.items()} for _ in range(given.turns)
    ]
    result = {
        "what": "microseconds of the host's CPU time per layer and micro batch, launches left out",
        **environment(torch.device("cpu")),
        "turns": given.turns,
        "stages": {
            name: {
                side: {
                    "median": round(statistics.median(turn[side][name] for turn in turns)),
                    "all": [round(turn[side][name]) for turn in turns],
                }
                for side in sides
            }
            for name in STAGES
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
