"""Training states on a full disk."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmmamba_cli.cli import user_error
from mmmamba_cli.distill import training_state
from mmmamba_cli.distill.training_state import StateFolder
from mmmamba_cli.distributed import World


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's writer says nothing of the disk."""
    states = StateFolder(tmp_path / "stage1", World(torch.device("cpu")))
    parameters = {"weight": nn.Parameter(torch.zeros(10, 10))}
    states.save("step-00000001", parameters, None, {"kept": True})

    def write(tensors: object, checkpoint_id: str, no_dist: bool) -> None:
        assert no_dist
        (Path(checkpoint_id) / "half").write_bytes(b"x")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(training_state.dcp, "save", write)
    free = SimpleNamespace(free=399)
    monkeypatch.setattr(training_state.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match="No space left on device") as full:
        states.save("step-00000002", parameters, None, {})
    assert full.value.errno == errno.ENOSPC
    said = user_error(full.value)
    assert said is not None and said.message == f"{tmp_path / 'stage1'}: the disk is full"
    assert [path.name for path in (tmp_path / "stage1").iterdir()] == ["step-00000001"]
    # Where there is room it is another failure, and keeps its traceback.
    free.free = 400
    with pytest.raises(RuntimeError, match="unexpected pos"):
        states.save("step-00000002", parameters, None, {})
