"""What was said so far, pictures included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint import atomic_folder, atomic_write_text
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import image_size
from mmmamba_cli.processing.chat_template import IMAGE_PLACEHOLDER, ImageSlot, image_lines


@dataclass
class Conversation:
    """Questions, each model's answers to them, and pictures in the order in which they came.

    Every model has its own history: it is shown its own answers. `waiting` are pictures that go
    with the next question.
    """

    names: tuple[str, ...]
    system: str | None = None
    questions: list[str] = field(default_factory=list)
    # One list of answers for each model; shorter than `questions` only while one is answered.
    answers: dict[str, list[str]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    waiting: list[Path] = field(default_factory=list)
    # How many of `pictures` came with each question.
    _shown: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = {name: [] for name in self.names}

    def add_picture(self, file: Path) -> tuple[int, int]:
        """Keep a picture for the next question; its width and height.

        Raises `DataError` if it cannot be read.
        """
        size = image_size(file)
        self.waiting.append(file)
        return size

    def ask(self, question: str) -> None:
        """Put a question, with the pictures that waited for one in front of it.

        What is typed is text, `<image>` too. Raises `DataError` for a question without words.
        """
        if not question.strip():
            raise DataError("the question is empty", "type one")
        self.questions.append(question)
        self._shown.append(len(self.waiting))
        self.pictures += self.waiting
        self.waiting = []

    def hear(self, name: str, answer: str) -> None:
        """Keep what a model answered to the last question."""
        self.answers[name].append(answer.rstrip())

    def take_back(self) -> None:
        """Forget the last question and what was answered to it; its pictures wait again."""
        self.questions.pop()
        for heard in self.answers.values():
            del heard[len(self.questions) :]
        kept = len(self.pictures) - self._shown.pop()
        self.waiting = self.pictures[kept:] + self.waiting
        del self.pictures[kept:]

    def pictures_of(self, number: int) -> list[Path]:
        """The pictures that came with a question, counted from 0."""
        start = sum(self._shown[:number])
        return self.pictures[start : start + self._shown[number]]

    def messages(self, name: str) -> list[dict[str, Any]]:
        """The conversation as model `name` knows it, up to the last question."""
        talk: list[dict[str, Any]] = []
        if self.system is not None:
            talk.append({"role": "system", "content": self.system})
        heard = self.answers[name]
        for number, question in enumerate(self.questions):
            talk.append({"role": "user", "content": _content(question, self._shown[number])})
            if number < len(heard):
                talk.append({"role": "assistant", "content": heard[number]})
        return talk

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.questions, self.pictures, self.waiting, self._shown = [], [], [], []
        self.answers = {name: [] for name in self.names}

    def save(self, file: Path) -> None:
        """Write JSON lines, one for each model, which `mmmamba data check` and `distill` read.

        Pictures below the file's folder are named as they lie there; others are copied into a
        folder beside the file, `NAME-images`. Raises `DataError` if there is nothing to write, the
        file or that folder exists, or a picture cannot be read any more.
        """
        if not self.questions:
            raise DataError("there is nothing to save yet")
        if file.exists():
            raise DataError(f"{file} exists already", "choose another name")
        if not file.parent.is_dir():
            raise DataError(f"{file} is in no folder that exists", "check the path")
        folder = file.with_name(f"{file.stem}-images")
        names, copied = _names(self.pictures, file.parent.resolve(), folder.name)
        if copied and folder.exists():
            raise DataError(f"{folder} exists already", "choose another name")
        lines = [json.dumps(self._record(name, names), ensure_ascii=False) for name in self.names]
        if copied:
            _copy(copied, folder)
        try:
            atomic_write_text(file, "".join(f"{line}\n" for line in lines))
        except OSError:
            if copied:
                shutil.rmtree(folder)
            raise

    def _record(self, name: str, pictures: list[str]) -> dict[str, object]:
        record: dict[str, object] = {"model": name}
        if pictures:
            record["images"] = pictures
        return {**record, "messages": self.messages(name)}


def _content(question: str, num_images: int) -> str | list[dict[str, str]]:
    """A question as a message's content: in parts where `<image>` would be taken for a picture."""
    if num_images == 0 and IMAGE_PLACEHOLDER not in question:
        return question
    parts = [*(image_lines(num_images) if num_images else []), question]
    content: list[dict[str, str]] = []
    for part in parts:
        if isinstance(part, ImageSlot):
            content.append({"type": "image"})
        elif part != "\n" or not content or content[-1] != {"type": "image"}:
            # The line end behind a picture belongs to its part.
            content.append({"type": "text", "text": part})
    return content


def _names(
    pictures: Sequence[Path], home: Path, folder: str
) -> tuple[list[str], list[tuple[Path, str]]]:
    """What pictures are called in a file of `home`, and which are copied under what names."""
    names, copied = [], []
    for number, picture in enumerate(pictures, start=1):
        path = picture.resolve()
        if path.is_relative_to(home):
            names.append(path.relative_to(home).as_posix())
            continue
        copied.append((path, f"{number}-{picture.name}"))
        names.append(f"{folder}/{number}-{picture.name}")
    return names, copied


def _copy(pictures: Sequence[tuple[Path, str]], folder: Path) -> None:
    with atomic_folder(folder) as partial:
        for path, name in pictures:
            try:
                shutil.copyfile(path, partial / name)
            except FileNotFoundError as error:
                raise DataError(f"image {path} does not exist any more") from error
