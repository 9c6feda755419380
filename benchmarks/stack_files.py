"""Count the project's files on the Python stack in three walks: how far a reader has to go down.

- eval: `mmmamba eval` to the logits of a question, at each call of an op;
- weight: `mmmamba seed` from a teacher's tensor to the product, at each call of a method of
  a tensor;
- token: `Generator.generate`, at each call of an op while tokens are decoded.

An op is a function defined below `mmmamba_cli/ops`. The result of a walk is the largest number of
distinct project files on one stack, with these files from the outermost to the innermost, and the
number of distinct files on all of them:

    python benchmarks/stack_files.py --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mmmamba_cli

PACKAGE = Path(mmmamba_cli.__file__).parent
OPS = PACKAGE / "ops"
MAIN = str(Path(__file__).resolve())
MODEL = "scenes-hybrid"


class Deepest:
    """The stack with the most project files that was seen, and the files of all stacks."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.all_files: set[str] = set()

    def note(self, frame: FrameType | None) -> None:
        files: list[str] = []
        while frame is not None:
            name = frame.f_code.co_filename
            if frame.f_code.co_name == "<module>" and name != MAIN:
                # An import, which is no step of the walk.
                return
            if name.startswith(f"{PACKAGE}/") and name not in files:
                files.append(name)
            frame = frame.f_back
        self.all_files.update(files)
        if len(files) > len(self.files):
            self.files = files

    def as_record(self) -> dict[str, Any]:
        names = [Path(name).relative_to(PACKAGE).as_posix() for name in reversed(self.files)]
        return {"count": len(names), "files": names, "all": len(self.all_files)}


@contextmanager
def watching(is_op: Callable[[FrameType, str, Any], bool]) -> Iterator[Deepest]:
    deepest = Deepest()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if is_op(frame, event, argument):
            deepest.note(frame)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield deepest
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def is_op_call(frame: FrameType, event: str, argument: Any) -> bool:
    return event == "call" and frame.f_code.co_filename.startswith(f"{OPS}/")


def is_tensor_call(frame: FrameType, event: str, argument: Any) -> bool:
    """Whether a method of a tensor is called, as to copy or cast it."""
    return event == "c_call" and isinstance(getattr(argument, "__self__", None), torch.Tensor)


def command(*words: object) -> None:
    from mmmamba_cli.__main__ import main

    sys.argv = ["mmmamba", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def eval_walk(folder: Path) -> Deepest:
    words = ("eval", "--suite", "scenes", "--limit", 1, "--model", MODEL, "--out", folder)
    with watching(is_op_call) as deepest:
        command(*words, "--device", "cpu", "--batch", 1)
    return deepest


def weight_walk(folder: Path) -> Deepest:
    words = ("seed", MODEL.replace("hybrid", "teacher"), "--run", folder / "run", "--no-report")
    with watching(is_tensor_call) as deepest:
        command(*words)
    return deepest


def token_walk(folder: Path) -> Deepest:
    try:
        from mmmamba_cli.inference import Generator
    except ModuleNotFoundError:
        # The room's name before the rename, so that both can be compared.
        from mmmamba_cli.decoding import Generator

    model = mmmamba_cli.load(MODEL)
    processor = mmmamba_cli.load_processor(MODEL)
    ids = processor.chat("What is shown?")["input_ids"]
    generator = Generator(model, graphs=False)
    rows = generator.stream(ids, max_new_tokens=4, eos=())
    # The prompt is read with the first token.
    next(rows)
    with watching(is_op_call) as deepest:
        list(rows)
    return deepest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    found = {}
    for name, walk in (("eval", eval_walk), ("weight", weight_walk), ("token", token_walk)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = walk(Path(folder)).as_record()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, record in found.items():
        files = " > ".join(record["files"])
        print(f"{name}: {record['count']} files, {record['all']} on all stacks: {files}")


if __name__ == "__main__":
    main()
