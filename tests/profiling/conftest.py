"""The command line in-process, and a small run with a random teacher and two students."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ended import Command, Done
from test_as_a_new_user import write_teacher

from mmmamba_cli.cli import main


@pytest.fixture
def mmmamba(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command, `mmmamba("profile", "--run", folder)`; paths may be given as they are."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["mmmamba", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        return Done(int(ended.value.code or 0), found.out, found.err)

    return run


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
