"""Console output: unwrapped lines, plain text, valid JSON."""

import io
import json
import sys
import warnings

import pytest

from mmmamba_cli.cli import console
from mmmamba_cli.errors import MmmambaWarning


def test_json_goes_to_stdout_only(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"größe": [1, None]})
    captured = capsys.readouterr()
    assert captured.out == '{\n  "größe": [\n    1,\n    null\n  ]\n}\n'
    assert captured.err == ""


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of a run may be NaN: a loss that is not finite, an agreement of no answers."""
    console.print_json({"loss": [float("nan"), 1.5], "rows": ({"best": float("-inf")},)})
    found = json.loads(capsys.readouterr().out)
    assert found == {"loss": [None, 1.5], "rows": [{"best": None}]}


def test_table_cells_are_not_wrapped_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/very/long/path" * 20
    console.print_table(
        ("layer", "file"), [(3, f"{path}[red].safetensors"), (10, None)], right=["layer"]
    )
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["3", f"{path}[red].safetensors"]
    assert second.split() == ["10", "-"]
    assert first.startswith("    3 ")


def test_errors_and_warnings_are_unwrapped_without_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "stages[1].lr: " + "is wrong " * 30 + "[bold]end[/bold]"
    console.print_error(f"{message}\nsecond")
    console.print_warning("mind")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"error: {message}", "error: second", "warning: mind"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_prints_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with console.progress("seeding", 100, "tensors", clock) as advance:
        for _ in range(50):
            clock.now += 0.5
            advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "seeding: 0/100 tensors",
        "seeding: 40/100 tensors",
        "seeding: 80/100 tensors",
        "seeding: 100/100 tensors",
    ]


def test_progress_prints_its_state_before_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with console.progress("copy", 3) as advance:
            advance(1)
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        fail()
    assert capsys.readouterr().err.splitlines() == ["copy: 0/3", "copy: 1/3"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console.err.cache_clear()
    try:
        with console.progress("copy [red]", 3, "files") as advance:
            advance(3)
    finally:
        console.err.cache_clear()
    assert "copy [red]" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert "copy [red]: 0/3" not in terminal.getvalue()


def test_warnings_of_one_category_are_limited(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Note(MmmambaWarning):
        pass

    with console.plain_warnings():
        for number in range(console.MAX_WARNINGS + 5):
            warnings.warn(Note(f"picture {number} has [frames]"), stacklevel=1)
        warnings.warn(MmmambaWarning("another kind"), stacklevel=1)
        with pytest.warns(UserWarning, match="not ours"):
            warnings.warn("not ours", stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: picture 0 has [frames]"
    more, other = lines[console.MAX_WARNINGS :]
    assert more == "warning: there are more such warnings, which are not shown"
    assert other == "warning: another kind"
