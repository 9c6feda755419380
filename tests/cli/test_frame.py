"""The command line: fast imports, exit codes and error messages."""

import errno
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ended import Command

import mmmamba_cli
import mmmamba_cli.cli
from mmmamba_cli.__main__ import main as entry_point
from mmmamba_cli.cli import app as frame
from mmmamba_cli.cli import main, options, user_error
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.recipe import section

ROOT = Path(__file__).parents[2]
MAIN = [sys.executable, "-m", "mmmamba_cli"]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "PIL")
DEV_FULL = Path("/dev/full")
# The default buffering: a failed write surfaces at the flush.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.fixture(scope="module")
def help_text() -> str:
    """What `mmmamba --help` prints."""
    return mmmamba("--help").stdout


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def mmmamba(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def raising(statement: str) -> str:
    """Code that runs main() with an additional command, which executes `statement`."""
    return (
        "import errno, os, sys, time, types\n"
        "from mmmamba_cli import errors\n"
        "from mmmamba_cli.cli import app as frame, main\n"
        f"def act():\n    {statement}\n"
        "module = sys.modules['mmmamba_cli.cli.act'] = types.ModuleType('mmmamba_cli.cli.act')\n"
        "module.command = act\n"
        "frame.COMMANDS = (*frame.COMMANDS, 'act')\n"
        "sys.argv = ['mmmamba', 'act']\n"
        "main()\n"
    )


def test_help_does_not_import_torch() -> None:
    unwanted = (*HEAVY, "pydantic", "yaml", "rich")
    code = (
        "import sys\nfrom mmmamba_cli.cli import main\nsys.argv = ['mmmamba', '--help']\n"
        "try:\n    main()\n"
        f"finally:\n    print([m for m in {unwanted} if m in sys.modules])\n"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


MODULES = [module.name for module in pkgutil.iter_modules(mmmamba_cli.cli.__path__)]


@pytest.fixture(scope="module")
def imported_by_modules() -> dict[str, list[str]]:
    """The libraries of HEAVY that each module of `cli` imports, in a fork that has none of them."""
    code = (
        "import importlib, os, sys, typer\n"
        f"for name in {MODULES}:\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        importlib.import_module(f'mmmamba_cli.cli.{name}')\n"
        f"        print(name, *[m for m in {HEAVY} if m in sys.modules], flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
    )
    done = python(code)
    return {name: heavy for name, *heavy in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("module", MODULES)
def test_command_modules_import_the_library_lazily(
    module: str, imported_by_modules: dict[str, list[str]]
) -> None:
    assert imported_by_modules[module] == []


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_every_command_has_help(
    name: str,
    help_text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process; `test_command_modules_import_the_library_lazily` starts one for each."""
    monkeypatch.setattr(sys, "argv", ["mmmamba", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert f"Usage: mmmamba {name}" in capsys.readouterr().out
    assert f"\n  {name} " in help_text


def test_the_recipe_package_does_not_import_torch() -> None:
    code = "import sys, mmmamba_cli.recipe\n"
    assert python(f"{code}print([m for m in {HEAVY} if m in sys.modules])").stdout == "[]\n"


def test_no_command_prints_help(help_text: str) -> None:
    bare = mmmamba()
    assert (bare.returncode, bare.stdout, bare.stderr) == (0, help_text, "")
    short = mmmamba("-h")
    assert (short.returncode, short.stdout) == (0, help_text)


def test_version() -> None:
    done = mmmamba("--version")
    assert (done.returncode, done.stdout) == (0, f"mmmamba {mmmamba_cli.__version__}\n")


@pytest.mark.parametrize("arguments", [["nothing"], ["--nothing"], ["recipe", "show"]])
def test_usage_error_exits_with_2(arguments: list[str]) -> None:
    done = mmmamba(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr


def test_user_error_is_one_sentence_and_exit_2() -> None:
    done = python(raising("raise errors.DataError('a[b]: is ' + 'x' * 200, hint='mend it')"))
    assert done.returncode == 2
    assert done.stderr == f"error: a[b]: is {'x' * 200} (mend it)\n"


def test_a_bug_prints_a_traceback_and_exits_with_1() -> None:
    done = python(raising("raise KeyError('ours')"))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("KeyError: 'ours'\n")


def test_exit_code_of_a_command() -> None:
    assert python(raising("sys.exit(130)")).returncode == 130


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM"])
def test_os_error_is_one_sentence_with_the_path(name: str) -> None:
    done = python(raising(f"raise OSError(errno.{name}, os.strerror(errno.{name}), 'some/file')"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: some/file: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("open('/dev/null/file')", "/dev/null/file: a part of this path is a file, not a folder"),
        ("open('/')", "/: this is a folder, not a file"),
        ("os.mkdir('/')", "/: something of this name is in the way"),
        ("open('x' * 300)", f"{'x' * 300}: the name is too long"),
    ],
)
def test_an_impossible_path_is_a_user_error(statement: str, said: str) -> None:
    done = python(raising(statement))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said} (")


def test_an_untranslated_missing_file_is_a_bug() -> None:
    done = python(raising("open('/gone')"))
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr


def test_an_os_error_without_a_path() -> None:
    full = user_error(OSError(errno.ENOSPC, "No space left on device"))
    assert full is not None
    assert (full.message, full.hint) == (
        "the disk is full",
        "free some space or choose another folder",
    )
    assert user_error(OSError(errno.EPERM, "Operation not permitted")) is None


def test_an_os_error_names_paths_of_any_kind() -> None:
    def said(path: object) -> str:
        return str(user_error(PermissionError(errno.EACCES, "denied", path)))

    assert said("a/b").startswith("a/b: permission denied")
    assert said(b"a/b").startswith("a/b: permission denied")
    assert said(Path("a/b")).startswith("a/b: permission denied")


@pytest.mark.skipif(not DEV_FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_full_disk_under_stdout_is_one_sentence(form: list[str]) -> None:
    with DEV_FULL.open("w") as full:
        done = subprocess.run(
            [*MAIN, "recipe", "show", "smoke", *form],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            env=BUFFERED,
        )
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "error: the disk is full (free some space or choose another folder)\n"
    )


def run_with_closed_reader(arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            arguments, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, env=BUFFERED
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    "arguments",
    [
        [*MAIN, "--help"],
        [*MAIN, "recipe", "list"],
        [*MAIN, "recipe", "show", "smoke"],
        [*MAIN, "recipe", "list", "--json"],
        [sys.executable, "-c", raising("print('x')")],
        [sys.executable, "-c", raising("print('x' * 100_000)")],
        [sys.executable, "-c", raising("sys.stdout.write('x' * 100); sys.stdout.flush()")],
    ],
)
def test_a_closed_pipe_is_silent(arguments: list[str]) -> None:
    done = run_with_closed_reader(arguments)
    assert (done.returncode, done.stderr) == (1, b"")


def test_user_error_is_printed_after_a_closed_pipe() -> None:
    code = raising("print('result'); raise errors.RunError('busy')")
    done = run_with_closed_reader([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (2, b"error: busy\n")


def test_a_closed_stdout_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *MAIN, "--version"], cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_interrupt_exits_with_130_silently() -> None:
    # A background shell job ignores Ctrl-C, and its child processes inherit that.
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = heed + raising("print('ready', flush=True); time.sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, b"")


def test_interrupt_before_the_app_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mmmamba_cli.cli, "_run", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130


def test_main_prints_every_user_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mistaken() -> None:
        raise CheckpointError("model.safetensors: is truncated")

    monkeypatch.setattr(mmmamba_cli.cli, "_run", mistaken)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: model.safetensors: is truncated\n"


def test_windows_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "platform", "win32")
        patch.setattr(mmmamba_cli.cli, "main", lambda: None)
        entry_point()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: mmmamba does not run on Windows (use WSL 2")


@pytest.mark.parametrize(
    "words",
    [
        "eval --suite mme --seed -1",
        "profile --seed 4294967296",
        "hybridize --seed -1",
        "eval --suite mme --batch ²",
        "profile --model scenes-linear --contexts 99999999999999999999",
    ],
)
def test_numbers_out_of_range_are_refused(words: str, mmmamba: Command) -> None:
    done = mmmamba(*words.split())
    assert done.code == 2 and words.split()[-2] in done.err, done.err


def test_seeds_of_options_are_those_of_recipes() -> None:
    assert options.MAX_SEED == section.MAX_SEED
