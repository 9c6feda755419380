"""Commands on students of transformers models that are killed, or meet a full disk."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, save_teacher
from test_overwrite import KILLS, killed
from test_seed_in_place import mmmamba, seed

from mmmamba_cli.checkpoint import open_in_place, writer
from mmmamba_cli.runs import Run

# While the seed is written, before it is renamed, and before the run's record.
PLACES = [
    ["open", "/products/.seed.partial", 1],
    ["open", "/products/.seed.partial", 4],
    ["os.rename", "/products/.seed.partial", 1],
    ["os.rename", "run.json", 1],
]
HYBRID_PLACES = [["open", "/products/.hybrid-2.partial", 2], ["os.rename", "run.json", 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("kills")
    save_teacher(FAMILIES["qwen3_vl"], folder / "teacher")
    seed(folder / "teacher", folder / "whole")
    mmmamba("hybridize", "--attn-layers", 2, "--run", folder / "whole")
    return folder


def hashes(run: Path) -> dict[str, str]:
    """Content hashes of the products, which are those of their files."""
    found = {name: one.content_hash for name, one in Run(run).products().items()}
    for name, content_hash in found.items():
        assert open_in_place(run / "products" / name).source.content_hash() == content_hash
    return found


def test_a_killed_seed_and_hybrid_are_made_again(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("seed", folder / "teacher", "--run", run, "--dtype", "fp32", "--no-report")
    rng = random.Random(KILLS)
    numbers = [rng.randint(1, 20) for _ in range(KILLS // 2)]
    starts = killed(tmp_path, (*words, "--overwrite"), [*PLACES, *numbers])
    assert sum("killed" in start for start in starts) >= len(PLACES)
    assert hashes(run) == {"seed": hashes(folder / "whole")["seed"]}
    (tmp_path / "report").unlink()
    words = ("hybridize", "--attn-layers", 2, "--run", run, "--overwrite")
    starts = killed(tmp_path, words, HYBRID_PLACES)
    assert sum("killed" in start for start in starts) == len(HYBRID_PLACES)
    assert hashes(run) == hashes(folder / "whole")
    assert Run(run).record == Run(folder / "whole").record
    left = [path.name for path in (run / "products").iterdir() if path.name.startswith(".")]
    assert not left


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    def write(descriptor: int, data: Any, offset: int) -> int:
        if len(written) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(data))
        return pwrite(descriptor, data, offset)

    pwrite = os.pwrite
    monkeypatch.setattr(writer.os, "pwrite", write)
    with pytest.raises(OSError, match="No space left"):
        seed(folder / "teacher", tmp_path / "run")
    assert len(written) == 30 and not (tmp_path / "run").exists()
