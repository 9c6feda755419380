"""A small run with a random teacher and two students."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_as_a_new_user import write_teacher

from mmmamba_cli.cli import main
from mmmamba_cli.profiling import timers


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default budgets, contexts and dtypes in these tests are those of a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session", autouse=True)
def other_load_takes_no_time() -> Iterator[None]:
    """Clocks of profiles count the CPU time of this thread, so that budgets and repeats do not
    depend on what else the machine does."""
    clocks = SimpleNamespace(perf_counter=time.thread_time, monotonic=time.thread_time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timers, "time", clocks)
        yield


@pytest.fixture(scope="session")
def profiled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a seeded student and a hybrid, both never distilled."""
    folder = write_teacher(tmp_path_factory.mktemp("profiled"))
    run = folder / "run"
    before = sys.argv
    for words in (
        ["seed", str(folder / "hovle.ckpt"), "--no-report", "--dtype", "fp32"],
        ["hybridize", "--attn-layers", "2"],
    ):
        sys.argv = ["mmmamba", *words, "--run", str(run)]
        try:
            main()
        except SystemExit as ended:
            assert not ended.code
        finally:
            sys.argv = before
    return run
