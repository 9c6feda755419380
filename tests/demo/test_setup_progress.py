"""`make setup` and `make smoke` never are silent: a line at least every 10 seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmmamba_cli.cli import console

ROOT = Path(__file__).parents[2]


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_setup_prints_the_time_and_the_share_of_a_download(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = load(ROOT / ".ci" / "with_progress.py")
    monkeypatch.setattr(wrapper, "INTERVAL", 0.1)
    pip = (
        "import sys, time\n"
        "print('Collecting torch', flush=True)\n"
        "print('Progress 50 of 200', flush=True)\n"
        "time.sleep(0.35)\n"
        "print('no space', file=sys.stderr)\n"
        "raise SystemExit(3)\n"
    )
    assert wrapper.main("3 of 4: torch", [sys.executable, "-c", pip]) == 3
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "3 of 4: torch"
    assert "Collecting torch" in lines and lines[-1] == "no space"
    assert "3 of 4: torch, after 0 s, 25% downloaded" in lines
    assert not any(line.startswith("Progress") for line in lines)


def test_smoke_prints_the_time_of_a_silent_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smoke = load(ROOT / "benchmarks" / "smoke.py")
    monkeypatch.setattr(console, "PROGRESS_LINE_INTERVAL", 0.1)
    script = tmp_path / "mmmamba"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, time\ntime.sleep(0.35)\nprint(sys.argv[1:])\nsys.exit(4)\n"
    )
    script.chmod(0o755)
    assert smoke.run(str(script), ["seed", "x"], tmp_path) == 4
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["$ mmmamba seed x", "['seed', 'x']"]
    assert shown.err.splitlines()[:2] == ["mmmamba seed", "mmmamba seed, after 0 s"]
