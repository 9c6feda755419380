"""Runs the commands of a page as they are written, in an empty folder.

    python docs/run_page.py docs/tutorial.md [--folder DIR]

These are its fences marked `bash`, in their order, each with one shell; the first that fails ends
it. A fence without a mark is only to be read: what downloads, needs a GPU, or shows output.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

# Inside a list it is indented.
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)
MARK = "bash"
OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "(", ")"}


@dataclass(frozen=True)
class Fence:
    """A block of code: its mark, its text, and the line of the page that it begins on."""

    mark: str
    text: str
    line: int


def fences(page: str) -> list[Fence]:
    """The blocks of code of a page."""
    found = FENCE.finditer(page)
    return [Fence(m[2], dedent(m[3]), page.count("\n", 0, m.start()) + 2) for m in found]


def mmmamba_calls(text: str) -> Iterator[list[str]]:
    """The words behind each `mmmamba`, or `-m mmmamba_cli`, that a shell's text calls."""
    joined = HEREDOC.sub("", text).replace("\\\n", " ")
    for line in joined.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        call: list[str] | None = None
        before: list[str] = []
        for word in [*lexer, ";"]:
            if word in OPERATORS:
                if call is not None:
                    yield call
                call, before = None, []
            elif call is not None:
                call.append(word)
            elif _begins_call(word, before):
                call = []
            else:
                before.append(word)


def _begins_call(word: str, before: list[str]) -> bool:
    if word == "mmmamba_cli":
        return before[-1:] == ["-m"]
    # Only variables may be set before it: `mmmamba` elsewhere is somebody's argument.
    return word == "mmmamba" and all("=" in one for one in before)


def run(page: Path, folder: Path) -> int:
    """Run the page's `bash` fences in `folder`; the exit code of the first that fails, or 0."""
    # Of this environment, whether or not it is activated.
    own = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    began = time.monotonic()
    for fence in fences(page.read_text(encoding="utf-8")):
        if fence.mark != MARK:
            continue
        print(f"--- {page.name}, line {fence.line}\n{fence.text}", flush=True)
        start = time.monotonic()
        words = ["bash", "-euo", "pipefail", "-c", fence.text]
        done = subprocess.run(words, cwd=folder, env={**os.environ, "PATH": own}, check=False)
        print(f"--- {time.monotonic() - start:.1f} s, exit code {done.returncode}", flush=True)
        if done.returncode:
            return done.returncode
    print(f"{page.name}: every command ran, {time.monotonic() - began:.0f} s in {folder}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--folder", type=Path, help="an empty folder, kept; else one that is not")
    given = parser.parse_args()
    if given.folder is None:
        with tempfile.TemporaryDirectory() as name:
            return run(given.page, Path(name))
    given.folder.mkdir(parents=True, exist_ok=True)
    if any(given.folder.iterdir()):
        parser.error(f"{given.folder} is not empty")
    return run(given.page, given.folder)


if __name__ == "__main__":
    sys.exit(main())
