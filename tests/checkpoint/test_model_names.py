"""Resolution of checkpoint names: a path, a shipped model, or an id on the Hub, in this order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ended import Command

from mmmamba_cli import plugins
from mmmamba_cli.checkpoint import model_names, open_checkpoint
from mmmamba_cli.errors import CheckpointError

SMALL = Path(__file__).parents[1] / "golden" / "hovle_pre"


@pytest.fixture
def ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two packages that ship models; both have one called `small`, the first one's counts."""
    monkeypatch.chdir(tmp_path)
    models = {}
    for name in ("small", "other"):
        models[name] = tmp_path / "package" / name
        models[name].mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(SMALL / file, models[name])
    theirs = {"small": str(tmp_path / "nowhere"), "third": str(tmp_path / "third")}
    entries = [("ours", lambda: lambda: models), ("theirs", lambda: theirs)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: iter(entries))
    return models


def test_a_shipped_name_opens_its_folder(ships: dict[str, Path]) -> None:
    assert open_checkpoint("small").path == ships["small"]
    assert model_names.shipped_models()["third"].name == "third"


def test_a_path_takes_precedence_over_a_shipped_name(ships: dict[str, Path]) -> None:
    shutil.copytree(ships["other"], "small")
    assert open_checkpoint("small").path == Path("small")


def test_an_unknown_name_lists_the_shipped_ones(ships: dict[str, Path], mmmamba: Command) -> None:
    done = mmmamba("seed", "smal", "--run", "run")
    assert done.code == 2
    assert "smal does not exist" in done.err and "small, other, third" in done.err
    # A file's name is no model's.
    with pytest.raises(CheckpointError, match=r"x\.safetensors does not exist \(check the path\)"):
        open_checkpoint("x.safetensors")


def test_a_hub_id_is_not_a_shipped_name(
    ships: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_names, "download_from_hub", lambda name: ships["other"])
    assert open_checkpoint("someone/small").path == ships["other"]


def test_public_name_of_a_shipped_folder(ships: dict[str, Path]) -> None:
    assert model_names.public_model_name(ships["other"]) == "other"
    assert model_names.public_model_name(ships["other"].parent) is None


def test_every_shipped_model_opens() -> None:
    found = model_names.shipped_models()
    assert "scenes-teacher" in found
    for name in found:
        checkpoint = open_checkpoint(name)
        assert checkpoint.tokenizer_file is not None, name


def test_missing_folders_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmmamba_evals

    (tmp_path / "scenes/models/hybrid").mkdir(parents=True)
    (tmp_path / "scenes/models/linear").mkdir()
    (tmp_path / "scenes/models/linear/config.json").touch()
    monkeypatch.setattr(mmmamba_evals, "HERE", tmp_path)
    assert list(mmmamba_evals.model_folders()) == ["scenes-linear"]
