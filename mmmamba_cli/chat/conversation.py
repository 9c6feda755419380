"""A conversation: questions, pictures, and each model's answers."""

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
    """Questions, each model's answers to them, and pictures in the order they were added.

    Every model has its own history: its prompts hold its own answers only. `pending` are the
    pictures that go with the next question.
    """

    names: tuple[str, ...]
    system: str | None = None
    questions: list[str] = field(default_factory=list)
    # One list for each model, shorter than `questions` only while a question is being answered.
    answers: dict[str, list[str]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    pending: list[Path] = field(default_factory=list)
    # Number of pictures of each question.
    _num_pictures: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers = {name: [] for name in self.names}

    def add_picture(self, file: Path) -> tuple[int, int]:
        """Add a picture to the next question; returns its width and height in pixels.

        Raises `DataError` if it cannot be read.
        """
        size = image_size(file)
        self.pending.append(file)
        return size

    def ask(self, question: str) -> None:
        """Add a question, behind the pending pictures.

        `<image>` in the question is plain text. Raises `DataError` for an empty question.
        """
        if not question.strip():
            raise DataError("the question is empty", "type one")
        self.questions.append(question)
        self._num_pictures.append(len(self.pending))
        self.pictures += self.pending
        self.pending = []

    def add_answer(self, name: str, answer: str) -> None:
        """Record a model's answer to the last question."""
        self.answers[name].append(answer.rstrip())

    def undo(self) -> None:
        """Remove the last question and its answers; its pictures are pending again."""
        self.questions.pop()
        for answers in self.answers.values():
            del answers[len(self.questions) :]
        kept = len(self.pictures) - self._num_pictures.pop()
        self.pending = self.pictures[kept:] + self.pending
        del self.pictures[kept:]

    def pictures_of(self, number: int) -> list[Path]:
        """The pictures of a question, counted from 0."""
        start = sum(self._num_pictures[:number])
        return self.pictures[start : start + self._num_pictures[number]]

    def messages(self, name: str) -> list[dict[str, Any]]:
        """The chat messages of model `name`, up to the last question."""
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        answers = self.answers[name]
        for number, question in enumerate(self.questions):
            messages.append(
                {"role": "user", "content": _content(question, self._num_pictures[number])}
            )
            if number < len(answers):
                messages.append({"role": "assistant", "content": answers[number]})
        return messages

    def reset(self) -> None:
        """Remove everything but the system prompt."""
        self.questions, self.pictures, self.pending, self._num_pictures = [], [], [], []
        self.answers = {name: [] for name in self.names}

    def save(self, file: Path) -> None:
        """Write JSON Lines that `mmmamba data check` and `distill` read, one line for each model.

        Pictures below the file's folder are referenced by relative path; others are copied into
        the folder `NAME-images` beside the file. Raises `DataError` if there is nothing to write,
        the file or that folder exists, or a picture has disappeared.
        """
        if not self.questions:
            raise DataError("there is nothing to save yet")
        if file.exists():
            raise DataError(f"{file} exists already", "choose another name")
        if not file.parent.is_dir():
            raise DataError(f"{file} is in no folder that exists", "check the path")
        folder = file.with_name(f"{file.stem}-images")
        names, copied = _plan_pictures(self.pictures, file.parent.resolve(), folder.name)
        if copied and folder.exists():
            raise DataError(f"{folder} exists already", "choose another name")
        lines = [json.dumps(self._record(name, names), ensure_ascii=False) for name in self.names]
        if copied:
            _copy_pictures(copied, folder)
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
    """A question as message content, in parts where `<image>` would be read as a picture."""
    if num_images == 0 and IMAGE_PLACEHOLDER not in question:
        return question
    parts = [*(image_lines(num_images) if num_images else []), question]
    content: list[dict[str, str]] = []
    for part in parts:
        if isinstance(part, ImageSlot):
            content.append({"type": "image"})
        elif part != "\n" or not content or content[-1] != {"type": "image"}:
            # The newline after a picture belongs to the picture's part.
            content.append({"type": "text", "text": part})
    return content


def _plan_pictures(
    pictures: Sequence[Path], home: Path, folder: str
) -> tuple[list[str], list[tuple[Path, str]]]:
    """Each picture's path in a file in `home`, and the pictures to copy with their new names."""
    names, copied = [], []
    for number, picture in enumerate(pictures, start=1):
        path = picture.resolve()
        if path.is_relative_to(home):
            names.append(path.relative_to(home).as_posix())
            continue
        copied.append((path, f"{number}-{picture.name}"))
        names.append(f"{folder}/{number}-{picture.name}")
    return names, copied


def _copy_pictures(pictures: Sequence[tuple[Path, str]], folder: Path) -> None:
    with atomic_folder(folder) as partial:
        for path, name in pictures:
            try:
                shutil.copyfile(path, partial / name)
            except FileNotFoundError as error:
                raise DataError(f"image {path} does not exist any more") from error
