"""A fuzz case: its folder, a command run in the sandbox, and checks of the outcome."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from ended import Done
from sandbox import sandboxed

from mmmamba_cli.cli import main

# MMMAMBA_FUZZ=10 runs ten times as many cases per kind; the first ones stay the same.
TIMES = int(os.environ.get("MMMAMBA_FUZZ", "1"))
LONGEST = 2500
# An interrupted `eval` keeps its answers to resume from.
KEPT = re.compile(r"out(/student(/pope(/predictions-\w+\.jsonl)?)?)?$")
# Lines on stderr that are not errors: remarks, and progress without a terminal.
REMARK = re.compile(r"warning: .*|.+: \d+/\d+( \w+)?|loading .+")
# Phrases of Python's own messages, which are not for users.
PYTHON = re.compile(
    r"Traceback|<class '|object at 0x|'NoneType'|object has no attribute|not subscriptable|"
    r"unexpected keyword|positional argument|not supported between|is not iterable|"
    r"unhashable|has no len\(\)|object is not callable"
)


def numbers(count: int) -> range:
    """Case numbers of one kind."""
    return range(count * TIMES)


class Case:
    """A case; its kind and number seed all randomness."""

    def __init__(self, kind: str, number: int, home: Path):
        self.kind, self.number, self.home = kind, number, home
        self.rng = random.Random(f"{kind} {number}")
        # Changes of the input, shown if the case fails.
        self.done: list[str] = []
        self.canary = home / "canary"
        self.last = Done(0, "", "")
        (home / "tmp").mkdir()

    def copy(self, source: Path, name: str = "input") -> Path:
        """Copy a file or folder into the case, to be corrupted."""
        target = self.home / name
        if source.is_dir():
            return shutil.copytree(source, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(source, target))

    def command(self, *words: object, encoding: str = "utf-8") -> Done:
        """Run the command in the sandbox with streams of that encoding.

        Any outcome other than an exit code is a failure.
        """
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in "oe")
        before, state = sys.argv, self._state()
        sys.argv = ["mmmamba", *map(str, words)]
        code: Any = 0
        try:
            with sandboxed(self.home), redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as ended:
            code = ended.code
        except BaseException as error:
            error.add_note(self.reproduction(words))
            raise
        finally:
            sys.argv = before
        done = self.last = Done(code or 0, *(written(stream, encoding) for stream in (out, err)))
        try:
            self._judge(done, state)
        except AssertionError as error:
            error.add_note(f"{self.reproduction(words)}\nstdout: {done.out}\nstderr: {done.err}")
            raise
        return done

    def call(self, function: Callable[[], Any], allowed: type[Exception]) -> Any:
        """Call a function in the sandbox; return its result, or the error if it is `allowed`."""
        found: Any
        try:
            with sandboxed(self.home):
                found = function()
        except allowed as error:
            found = error
            check_message(str(error))
        except BaseException as error:
            error.add_note(self.reproduction(()))
            raise
        assert not self.canary.exists(), self.reproduction(())
        return found

    def reproduction(self, words: tuple[object, ...]) -> str:
        """How to reproduce this case."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        return (
            f"case {self.kind}-{self.number}: {'; '.join(self.done) or 'nothing changed'}\n"
            f"command: mmmamba {' '.join(map(str, words))}\n"
            f"again: MMMAMBA_FUZZ={TIMES} pytest '{test}'"
        )

    def _judge(self, done: Done, before: dict[str, tuple[int, ...]]) -> None:
        assert not self.canary.exists(), "code of the input was run"
        assert done.code in (0, 2), f"ended with {done.code}"
        lines = done.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        strange = [x for x in lines if x not in errors and not REMARK.fullmatch(x)]
        assert not strange, strange
        after = self._state()
        halves = [name for name in after if "partial" in name or ".old-" in name]
        assert not halves, f"left half-written: {halves}"
        assert not list((self.home / "tmp").iterdir()), "left temporary files"
        if done.code == 0:
            assert not errors, "an error and the exit code 0"
            return
        # Recipe errors list all problems, one per line.
        many = bool(errors) and ".yaml: " in errors[0]
        assert len(errors) == 1 or many, f"{len(errors)} sentences"
        for sentence in errors:
            check_message(sentence)
        changed = {name for name, _ in after.items() ^ before.items()}
        assert not {name for name in changed if not KEPT.match(name)}, f"changed: {changed}"

    def _state(self) -> dict[str, tuple[int, ...]]:
        """The contents of the case's folder, without a run's lock."""
        found = {}
        for folder, folders, files in os.walk(self.home):
            for name in (*folders, *files):
                path = Path(folder, name)
                known = path.lstat()
                if name != ".lock":
                    fixed = (known.st_size, known.st_mtime_ns) if name in files else (0, 0)
                    found[str(path.relative_to(self.home))] = fixed
        return found


def written(stream: io.TextIOWrapper, encoding: str) -> str:
    """Decode the output; every byte must be valid in the encoding."""
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(encoding)


def check_message(text: str) -> None:
    """Assert one readable line: short, no Python internals, no terminal control codes."""
    assert 15 < len(text) <= LONGEST, f"a sentence of {len(text)} characters"
    assert not PYTHON.search(text), f"Python's words: {text}"
    assert text.isprintable(), f"signs that a terminal obeys: {text!r}"


def outcome(done: Done) -> Any:
    """Parse the output of `--json`."""
    return json.loads(done.out)
