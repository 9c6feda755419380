"""A run to export; the exported code is bundled once: it is the same for every export."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from exported_runs import CASE, mmmamba

from mmmamba_cli.export import sidecar_files


@pytest.fixture(scope="session", autouse=True)
def bundled_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        bundle = functools.cache(sidecar_files.bundle_files)
        patch.setattr(sidecar_files, "bundle_files", bundle)
        yield


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an untrained seed and an untrained hybrid of it, which tests copy."""
    run = tmp_path_factory.mktemp("exported") / "run"
    mmmamba("seed", CASE.resolve(), "--run", run, "--dtype", "fp32", "--no-report")
    mmmamba("hybridize", "--attn-layers", "2", "--run", run)
    return run


@pytest.fixture
def run(exported_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, in a place whose name no card may show."""
    place = tmp_path / "secret-place/run"
    shutil.copytree(exported_run, place)
    return place
