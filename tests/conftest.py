"""What every test may use: the golden cases, small random models, the command in-process."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest
from steady_environment import clear_environment

clear_environment()

# As many processes as cores test side by side; threads of torch in each would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import typer.testing  # noqa: E402
from ended import Command, Done  # noqa: E402

from mmmamba_cli.cli import main, quiet_timer  # noqa: E402

# The same examples everywhere and each time, however slow the machine is. With MMMAMBA_FUZZ, which
# asks for more cases of odd input, each run draws other examples.
hypothesis.settings.register_profile(
    "steady",
    derandomize="MMMAMBA_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("steady")

GOLDEN = Path(os.environ.get("MMMAMBA_GOLDEN", Path(__file__).parent / "golden"))


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection: commands collect many times."""
    gc.freeze()


def golden_cases() -> list[Path]:
    """Every case folder; none at all is a broken checkout, not a reason to skip."""
    cases = sorted(p.parent for p in GOLDEN.glob("*/golden.safetensors"))
    if not cases:
        raise pytest.UsageError(f"no golden case in {GOLDEN}: set MMMAMBA_GOLDEN")
    return cases


@pytest.fixture(scope="session", autouse=True)
def app_built_once() -> Iterator[None]:
    """`CliRunner` would build all commands and options for every command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", cache(typer.testing._get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_time_notes() -> Iterator[None]:
    """No notes about slow imports and steps on stderr: on a busy machine any may be slow."""
    # They copy the interval, for bars and lines of progress, while they are imported.
    from mmmamba_cli.cli import console, distill_display  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quiet_timer, "PROGRESS_LINE_INTERVAL", 3600.0)
        patch.setattr(quiet_timer, "FIRST_IMPORT_NOTE", 3600.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def real_fsync() -> Iterator[Callable[[int], None]]:
    """The real `os.fsync`, which does nothing in this process: it waits for the disk."""
    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield fsync


@pytest.fixture(params=golden_cases(), ids=lambda case: case.name)
def golden_case(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def hovle_folder(tmp_path: Path) -> Path:
    """A small HoVLE with "post" pixel shuffle: config and weights, and a tokenizer that fits."""
    import shutil

    folder = tmp_path / "hovle"
    folder.mkdir()
    source = Path(__file__).parent / "golden" / "hovle_post"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.fixture
def hovle_ckpt(hovle_folder: Path) -> Path:
    """The same as a bare state dict with its config beside it."""
    from safetensors.torch import load_file

    file = hovle_folder.parent / "bare" / "hovle.ckpt"
    file.parent.mkdir()
    torch.save(load_file(hovle_folder / "model.safetensors"), file)
    config = json.loads((hovle_folder / "config.json").read_text())
    (file.parent / "config.json").write_text(json.dumps(config))
    return file


@pytest.fixture
def mmmamba(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command, `mmmamba("eval", "--suite", "mme")`; paths may be given as they are."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["mmmamba", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        return Done(int(ended.value.code or 0), found.out, found.err)

    return run
