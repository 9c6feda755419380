"""Console output: unwrapped lines, plain text, valid JSON."""

import importlib
import io
import json
import re
import sys
import time
import warnings
from pathlib import Path

import pytest

from mmmamba_cli.cli import console, quiet_timer
from mmmamba_cli.errors import MmmambaWarning


def lines_on_stderr(capsys: pytest.CaptureFixture[str], number: int) -> list[str]:
    """Wait until `number` lines are printed; return the lines that are printed by then."""
    err, end = "", time.monotonic() + 120
    while err.count("\n") < number:
        assert time.monotonic() < end, err
        time.sleep(0.01)
        err += capsys.readouterr().err
    return err.splitlines()


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


def test_rows_have_no_trailing_blanks_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for to_stderr in (False, True):
        console.print_table(
            ("a", "b"), [("x", "longer"), ("longest", "y")], title="T", to_stderr=to_stderr
        )
        found = capsys.readouterr()
        lines = (found.err if to_stderr else found.out).splitlines()
        assert (found.out if to_stderr else found.err) == ""
        assert lines == [line.rstrip() for line in lines]
        assert [line.split() for line in lines[-2:]] == [["x", "longer"], ["longest", "y"]]


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
        "seeding: 40/100 tensors, after 10 s, about 15 s left",
        "seeding: 80/100 tensors, after 20 s, about 5 s left",
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (17.2, "17 s"),
        (42, "40 s"),
        (97, "95 s"),
        (98, "1.5 minutes"),
        (165, "3 minutes"),
        (400, "6.5 minutes"),
        (3000, "50 minutes"),
    ],
)
def test_times_are_rounded(seconds: float, text: str) -> None:
    assert console.approximate_time(seconds) == f"about {text}"


def test_progress_repeats_its_line_during_a_long_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PROGRESS_LINE_INTERVAL", 0.05)
    with console.progress("profiling", 3, "measurements"):
        lines = lines_on_stderr(capsys, 3)
    assert lines[0] == "profiling: 0/3 measurements"
    assert {line.partition(", after ")[0] for line in lines[1:]} == {"profiling: 0/3 measurements"}
    # It has ended with the step.
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_progress_without_a_number_shows_the_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PROGRESS_LINE_INTERVAL", 0.05)
    with console.progress("loading"):
        first, second, *_ = lines_on_stderr(capsys, 2)
    assert first == "loading"
    assert re.fullmatch(r"loading, after \d+ s", second)


def test_a_long_import_is_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quiet_timer, "PROGRESS_LINE_INTERVAL", 0.05)
    monkeypatch.syspath_prepend(str(tmp_path))
    noted: list[str] = []
    monkeypatch.setattr(
        sys, "slow_step", lambda: noted.extend(lines_on_stderr(capsys, 1)), raising=False
    )
    (tmp_path / "slow_library.py").write_text("import sys\nsys.slow_step()\n")
    with quiet_timer.import_notes():
        time.sleep(0.3)
        assert capsys.readouterr().err == ""
        importlib.import_module("slow_library")
    assert re.fullmatch(r"loading libraries, after \d+ s", noted[0])


def test_the_first_note_about_imports_comes_early_with_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Light commands do not import it: on a busy machine they would print lines for nothing."""
    monkeypatch.setattr(quiet_timer, "FIRST_IMPORT_NOTE", 0.05)
    monkeypatch.syspath_prepend(str(tmp_path))
    noted: list[str] = []
    monkeypatch.setattr(
        sys, "slow_step", lambda: noted.extend(lines_on_stderr(capsys, 1)), raising=False
    )
    for name, modules, rank, step in (
        ("light", {}, "0", "time.sleep(0.3)"),
        ("heavy", {"torch": sys}, "0", "sys.slow_step()"),
        ("second_process", {"torch": sys}, "1", "time.sleep(0.3)"),
    ):
        (tmp_path / f"slow_{name}.py").write_text(f"import sys, time\n{step}\n")
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        for module, there in modules.items():
            monkeypatch.setitem(sys.modules, module, there)
        with quiet_timer.import_notes():
            importlib.import_module(f"slow_{name}")
        said = capsys.readouterr().err
        assert name == "heavy" or said == ""
    assert re.fullmatch(r"loading libraries, after \d+ s", noted[0])


def test_a_long_step_is_noted_and_a_short_one_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet_timer.time_notes("loading hybrid"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(quiet_timer, "PROGRESS_LINE_INTERVAL", 0.05)
    with quiet_timer.time_notes("loading hybrid"):
        lines = lines_on_stderr(capsys, 1)
    assert re.fullmatch(r"loading hybrid, after \d+ s", lines[0])


def test_given_time_left_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with console.progress("demo", 4, "parts", clock, time_left=lambda: 240.0) as advance:
        clock.now += 30
        advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "demo: 0/4 parts",
        "demo: 1/4 parts, after 30 s, about 4 minutes left",
    ]


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


def test_progress_in_a_dumb_terminal_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar is drawn by moving the cursor, which such a terminal cannot do."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    console.err.cache_clear()
    try:
        with console.progress("copy", 3, "files") as advance:
            advance(3)
    finally:
        console.err.cache_clear()
    assert terminal.getvalue().splitlines() == ["copy: 0/3 files", "copy: 3/3 files"]


def test_bar_leaves_a_redirected_stdout_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console.err.cache_clear()
    try:
        with console.progress("copy", 3, "files", time_left=lambda: 240.0):
            print("a result")
    finally:
        console.err.cache_clear()
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in terminal.getvalue()
    assert "about 4 minutes left" in terminal.getvalue()


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
