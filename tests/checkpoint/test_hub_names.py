"""Checkpoints named by Hub id: downloaded by huggingface_hub, or one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmmamba_hf_case import write_released
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.app import app
from mmmamba_cli.errors import CheckpointError, MmmambaError


def mmmamba(*words: object) -> Any:
    """Run the command line; a MmmambaError is raised."""
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def no_files_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_a_hub_id_is_downloaded_and_read(
    golden_case: Path, no_files_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = no_files_here / f"cache/models--someone--model-1.5/snapshots/{commit}"
    write_released(folder, golden_case, "hybrid")
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    words = ("someone/model-1.5", "--run", "run", "--json")
    product = json.loads(mmmamba("import", *words).stdout)["product"]
    assert product["parents"][0]["name"] == f"someone/model-1.5@{commit[:12]}"
    assert asked[0][0] == "someone/model-1.5" and asked[0][1]["revision"] is None
    assert not any(".py" in pattern for pattern in asked[0][1]["allow_patterns"])
    open_checkpoint("someone/model-1.5@v2")
    assert asked[-1][1]["revision"] == "v2"


def test_pytorch_files_are_downloaded_without_safetensors(
    golden_case: Path, no_files_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = no_files_here / "snapshot"
    write_released(folder, golden_case, "linear")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    asked: list[list[str]] = []

    def download(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        if "*.bin" in allow_patterns:
            torch.save(state, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("someone/model").source.kind == "pickle"
    assert "*.safetensors" in asked[0] and "*.bin" in asked[1]


def refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import huggingface_hub

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def hub_error(name: str, text: str = "Bearer hf_secret") -> Exception:
    """An error of huggingface_hub, built without an HTTP response."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error: Exception = kind.__new__(kind)
    error.args = (text,)
    return error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GatedRepoError", "someone/model on the Hugging Face Hub is gated"),
        ("RepositoryNotFoundError", "neither on this disk nor on the Hugging Face Hub"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("LocalEntryNotFoundError", "cannot be reached .LocalEntryNotFoundError"),
        ("OfflineModeIsEnabled", "cannot be reached"),
    ],
)
def test_hub_errors(
    no_files_here: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    refused(monkeypatch, hub_error(name))
    with pytest.raises(CheckpointError, match=said) as raised:
        mmmamba("seed", "someone/model@v9", "--run", "run")
    assert "hf_secret" not in str(raised.value)
    assert not Path("run").exists()


def test_offline_mode_of_huggingface_hub(no_files_here: Path) -> None:
    """huggingface_hub in offline mode."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(no_files_here / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "mmmamba_cli", "seed", "someone/model"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: someone/model is not on this disk, and the Hugging Face")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["models/hovle", "someone/hovle.ckpt", "./a/b", "a", "a/b/c"])
def test_paths_are_never_looked_for_on_the_hub(
    no_files_here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refused(monkeypatch, AssertionError("asked the Hub"))
    Path("models").mkdir()
    with pytest.raises(MmmambaError, match="does not exist"):
        open_checkpoint(name)
