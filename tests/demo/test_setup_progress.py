"""`make setup` and `make smoke` never are silent: a line at least every 10 seconds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmmamba_cli.cli import console

ROOT = Path(__file__).parents[2]


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def noted(tmp_path: Path) -> Path:
    """A file that a silent command waits for; the test writes it once the time was printed."""
    return tmp_path / "noted"


def silent_until(noted: Path) -> str:
    """Code that ends after two minutes even if the time is never printed."""
    return (
        "import pathlib, sys, time\n"
        "end = time.monotonic() + 120\n"
        f"while not pathlib.Path({str(noted)!r}).exists() and time.monotonic() < end:\n"
        "    time.sleep(0.02)\n"
    )


def test_setup_prints_the_time_and_the_share_of_a_download(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, noted: Path
) -> None:
    wrapper = load(ROOT / ".ci" / "with_progress.py")
    monkeypatch.setattr(wrapper, "INTERVAL", 0.1)
    print_line = wrapper.TimeLines.print

    def print_and_note(lines: object, line: str) -> None:
        print_line(lines, line)
        if "downloaded" in line:
            noted.touch()

    monkeypatch.setattr(wrapper.TimeLines, "print", print_and_note)
    pip = (
        "print('Collecting torch', flush=True)\n"
        "print('Progress 50 of 200', flush=True)\n"
        + silent_until(noted)
        + "print('no space', file=sys.stderr)\n"
        "raise SystemExit(3)\n"
    )
    assert wrapper.main("3 of 4: torch", [sys.executable, "-c", pip]) == 3
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "3 of 4: torch"
    assert "Collecting torch" in lines
    # A process that ends slowly may be followed by a line with the time.
    assert [line for line in lines if ", after " not in line][-1] == "no space"
    assert any(re.fullmatch(r"3 of 4: torch, after \d+ s, 25% downloaded", x) for x in lines)
    assert not any(line.startswith("Progress") for line in lines)


def test_smoke_prints_the_time_of_a_silent_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, noted: Path, tmp_path: Path
) -> None:
    smoke = load(ROOT / "benchmarks" / "smoke.py")
    monkeypatch.setattr(console, "PROGRESS_LINE_INTERVAL", 0.1)
    time_note = console._time_note

    def note(*arguments: Any) -> str:
        noted.touch()
        return time_note(*arguments)

    monkeypatch.setattr(console, "_time_note", note)
    script = tmp_path / "mmmamba"
    script.write_text(
        f"#!{sys.executable}\n{silent_until(noted)}print(sys.argv[1:])\nsys.exit(4)\n"
    )
    script.chmod(0o755)
    assert smoke.run(str(script), ["seed", "x"], tmp_path) == 4
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["$ mmmamba seed x", "['seed', 'x']"]
    first, second, *_ = shown.err.splitlines()
    assert first == "mmmamba seed"
    assert re.fullmatch(r"mmmamba seed, after \d+ s", second)
