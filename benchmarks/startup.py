"""Start-up time of a distillation, from the start of the process to the first step, by part.

    python benchmarks/startup.py [--device cuda] [--runs 2] [--out FILE]

Each run is a process that loads the shipped teacher and its seeded student and takes one step of
stage 1 on a few texts. Counts imported modules, calls of Python's `compile` (separately for modules
without byte code, as on their first import), and registrations of custom operators without the
imports that they trigger. `--no-cache` neither reads nor writes byte code, as on the first start of
an installation. Works in a checkout without installation. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.machinery
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEACHER = ROOT / "evals" / "scenes" / "models" / "teacher"
STARTED = "MMMAMBA_BENCHMARK_STARTED"
OPERATORS = "torch._library.custom_ops"


class Counters:
    """Profiles a process until its first step; `install` it before all other imports."""

    def __init__(self) -> None:
        self.compiled: Counter[str] = Counter()
        self.compiling: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.registering = 0.0
        self.imported = 0
        self.importing = 0.0
        self._depth = 0

    def install(self) -> None:
        self._count_compile()
        self._count_imports()
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Wrap the class of the custom operator module once, to count registrations."""
        if name != OPERATORS:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            self._count_operators(module.CustomOpDef)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _count_compile(self) -> None:
        real = builtins.compile

        def counted(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_code.co_name
            kind = "modules" if caller == "_call_with_frames_removed" else "other"
            began = time.perf_counter()
            try:
                return real(*arguments, **options)
            finally:
                self.compiled[kind] += 1
                self.compiling[kind] += time.perf_counter() - began  # type: ignore[assignment]

        builtins.compile = counted  # type: ignore[assignment]

    def _count_imports(self) -> None:
        loader: Any = importlib.machinery.SourceFileLoader
        real = loader.exec_module

        def counted(self_: Any, module: Any) -> None:
            self.imported += 1
            self._depth += 1
            began = time.perf_counter()
            try:
                real(self_, module)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.importing += time.perf_counter() - began

        loader.exec_module = counted

    def _count_operators(self, definition: Any) -> None:
        real = definition.__init__

        def counted(self_: Any, namespace: str, *arguments: Any, **options: Any) -> None:
            depth, importing = self._depth, self.importing
            # Clear the import stack, so that imports from here on are timed separately.
            self._depth = 0
            began = time.perf_counter()
            try:
                real(self_, namespace, *arguments, **options)
            finally:
                within = self.importing - importing
                self.registering += time.perf_counter() - began - within
                self._depth, self.importing = depth, importing
                self.operators[namespace] += 1

        definition.__init__ = counted

    def summary(self) -> dict[str, Any]:
        return {
            "modules_imported": self.imported,
            "seconds_importing": round(self.importing, 2),
            "compile_calls": dict(self.compiled),
            "seconds_compiling": {kind: round(s, 2) for kind, s in self.compiling.items()},
            "operators_registered": dict(self.operators.most_common()),
            "seconds_registering": round(self.registering, 2),
        }


def child(folder: Path, device: str) -> None:
    """The measured process."""
    counters = Counters()
    counters.install()
    marks: dict[str, float] = {}
    begun = float(os.environ[STARTED])

    def mark(name: str) -> None:
        marks.setdefault(name, round(time.time() - begun, 2))

    mark("interpreter")
    import torch  # noqa: F401

    mark("torch_imported")
    from mmmamba_cli.distill import DistillOptions, StageCallbacks, distill
    from mmmamba_cli.distributed import join_world
    from mmmamba_cli.recipe import load_recipe
    from mmmamba_cli.runs import Run

    run = Run(folder / "run")
    recipe = load_recipe("scenes-linear", overrides=settings(folder))
    watch = StageCallbacks(
        lambda line: None,
        lambda *_: mark("models_loaded"),
        lambda result: mark("first_step"),
        lambda: False,
    )
    with join_world(device) as world, run.lock_existing():
        mark("mmmamba_imported")
        distill(
            run, recipe, world, watch, wanted=("stage1",), options=DistillOptions(overwrite=True)
        )
    mark("product_written")
    print(json.dumps({"seconds_until": marks, **counters.summary()}))


def settings(folder: Path) -> dict[str, Any]:
    return {
        "teacher": str(TEACHER),
        "data.train": str(folder / "texts.jsonl"),
        "data.workers": 0,
        "stages.stage1.steps": 1,
        "stages.stage1.batch_size": 2,
    }


def prepare(folder: Path) -> None:
    """Training texts and a seeded run."""
    import torch

    from mmmamba_cli.checkpoint import open_checkpoint
    from mmmamba_cli.recipe import load_recipe
    from mmmamba_cli.runs import Run
    from mmmamba_cli.seed import seed_student

    lines = [json.dumps({"text": f"There are {n} cups on the table."}) + "\n" for n in range(4)]
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    recipe = load_recipe("scenes-linear", overrides=settings(folder))
    run = Run(folder / "run")
    with run.lock():
        seed_student(run, open_checkpoint(str(TEACHER)), recipe, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.child is not None:
        child(given.child, given.device)
        return
    with tempfile.TemporaryDirectory() as text:
        found = measure(Path(text), given)
    printed = json.dumps(found, indent=2)
    print(printed)
    if given.out is not None:
        given.out.write_text(printed + "\n", encoding="utf-8")


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--device", given.device, "--child", str(folder)]
    environment = dict(os.environ)
    if given.no_cache:
        # An empty byte code folder that is never written.
        environment |= {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    prepare_in = f"import startup, pathlib; startup.prepare(pathlib.Path({str(folder)!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    # Also in a separate process: seeding has imported parts of torch into this one.
    subprocess.run(
        [sys.executable, "-c", prepare_in], check=True, env={**environment, "PYTHONPATH": paths}
    )
    runs = []
    for _ in range(given.runs):
        started = {**environment, STARTED: str(time.time())}
        result = subprocess.run(words, check=True, env=started, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(result.stdout.splitlines()[-1]))
    return {
        "what": "seconds until the first step of a distillation",
        "device": given.device,
        "byte_code_cache": not given.no_cache,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
