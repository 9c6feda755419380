"""What was said so far, pictures included."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import image_size
from mmmamba_cli.processing.template import IMAGE_PLACEHOLDER, place_images


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

        Raises `DataError` for a question without words, or one that places pictures itself.
        """
        if not question.strip():
            raise DataError("the question is empty", "type one")
        if self.waiting:
            if IMAGE_PLACEHOLDER in question:
                raise DataError(
                    f"the question says {IMAGE_PLACEHOLDER}, which stands for a picture",
                    "leave it out: pictures are put in front of the question",
                )
            question = place_images(question, len(self.waiting))
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

    def messages(self, name: str) -> list[dict[str, str]]:
        """The conversation as model `name` knows it, up to the last question."""
        talk = [] if self.system is None else [{"role": "system", "content": self.system}]
        heard = self.answers[name]
        for number, question in enumerate(self.questions):
            talk.append({"role": "user", "content": question})
            if number < len(heard):
                talk.append({"role": "assistant", "content": heard[number]})
        return talk

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.questions, self.pictures, self.waiting, self._shown = [], [], [], []
        self.answers = {name: [] for name in self.names}

    def save(self, file: Path) -> None:
        """Write JSON lines, one for each model, which `mmmamba data check` and `distill` read.

        Raises `DataError` if there is nothing to write, or the file exists.
        """
        if not self.questions:
            raise DataError("there is nothing to save yet")
        if file.exists():
            raise DataError(f"{file} exists already", "choose another name")
        lines = [json.dumps(self._record(name), ensure_ascii=False) for name in self.names]
        try:
            atomic_write_text(file, "".join(f"{line}\n" for line in lines))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(f"{file} is in no folder that exists", "check the path") from error

    def _record(self, name: str) -> dict[str, object]:
        record: dict[str, object] = {"model": name}
        if self.pictures:
            record["images"] = [str(file.resolve()) for file in self.pictures]
        return {**record, "messages": self.messages(name)}
