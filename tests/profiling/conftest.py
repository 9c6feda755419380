"""A small run with a random teacher and two students."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_as_a_new_user import write_teacher

from mmmamba_cli.cli import main


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default budgets, contexts and dtypes in these tests are those of a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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
