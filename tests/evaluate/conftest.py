"""A small run with a random teacher and its seeded student."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from suite_tables import mme_rows, pope_rows, write_tsv
from test_as_a_new_user import write_teacher

from mmmamba_cli.cli import main


def enliven(checkpoint: Path) -> None:
    """Set random weights of a scale that makes answers differ between questions."""
    rng = torch.Generator().manual_seed(1)
    state = torch.load(checkpoint)["state_dict"]
    for name, tensor in state.items():
        scale = 0.5 if tensor.dim() == 1 else 1.5 / tensor[0].numel() ** 0.5
        noise = scale * torch.randn(tensor.shape, generator=rng)
        state[name] = noise + 1 if "norm" in name else noise
    torch.save({"state_dict": state}, checkpoint)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only product is a seeded student, never distilled."""
    folder = write_teacher(tmp_path_factory.mktemp("teacher"))
    enliven(folder / "hovle.ckpt")
    run = folder / "run"
    before = sys.argv
    sys.argv = ["mmmamba", "seed", str(folder / "hovle.ckpt"), "--no-report", "--run", str(run)]
    sys.argv += ["--dtype", "fp32"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
    finally:
        sys.argv = before
    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """MME with two pictures in each of 14 categories, and POPE with four questions a split."""
    write_tsv(tmp_path / "data" / "MME.tsv", mme_rows())
    write_tsv(tmp_path / "data" / "POPE.tsv", pope_rows())
    return tmp_path / "data"
