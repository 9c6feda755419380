"""A small run with a random teacher and its seeded student, scripted models, and tables."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripted_mme import mostly_right
from suite_tables import ScriptedModel, mme_rows, pope_rows, write_tsv
from test_as_a_new_user import write_teacher

from mmmamba_cli import runs
from mmmamba_cli.cli import main
from mmmamba_cli.evaluate import model_adapter


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


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedModel]:
    """Replace every checkpoint by a scripted model with the name of its folder."""
    made: dict[str, ScriptedModel] = {}

    def resolve(path: Path) -> SimpleNamespace:
        made.setdefault(path.name, ScriptedModel(mostly_right, name=path.name))
        return SimpleNamespace(name=path.name, origin="path")

    monkeypatch.setattr(runs, "resolve_path", resolve)
    monkeypatch.setattr(model_adapter, "load_eval_model", lambda found, *where: made[found.name])
    return made
