"""What a person sees of a conversation, what they can type, and how they stop it."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from mmmamba_cli.cli.console import print_error, print_line, print_warning
from mmmamba_cli.errors import DataError, MmmambaError

if TYPE_CHECKING:
    from mmmamba_cli.chat import Answer, ChatModel, Conversation, Settings, SideBySide

INTERRUPTED = 130
PROMPT = "> "
# Cells of a line in a terminal that says it has hardly any.
NARROWEST = 8
HELP = {
    "/image FILE": "show a picture with the next question",
    "/reset": "forget the conversation",
    "/history": "print the conversation",
    "/save FILE": "write it as JSON lines, as training data has them",
    "/quit": "leave; so does Ctrl-D",
    "/help": "this list; a question that begins with / wants a space before it",
}
# What could move the cursor or change the terminal; a model may say anything.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Leave(Exception):
    """The conversation is over."""


@dataclass
class _StopKey:
    """Notes the first Ctrl-C while an answer is given; the second one leaves."""

    pressed: bool = False

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    @contextmanager
    def watched(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self.note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Talk:
    """A conversation with one or more loaded models."""

    def __init__(
        self, speakers: Sequence[ChatModel], conversation: Conversation, settings: Settings
    ) -> None:
        self.speakers = tuple(speakers)
        self.conversation = conversation
        self.settings = settings
        self._stop = _StopKey()

    def show(self, file: Path) -> str:
        """Keep a picture for the next question, and say so."""
        for speaker in self.speakers:
            if not speaker.sees:
                raise blind(speaker.name, file)
        width, height = self.conversation.add_picture(file)
        return f"{file.name}, {width} x {height}, goes with the next question"

    def as_record(self, question: str) -> dict[str, Any]:
        """One question and its answers, for machines."""
        self.conversation.ask(question)
        answers = []
        for speaker in self.speakers:
            begun = time.perf_counter()
            found = self._speak(speaker, lambda piece: None)
            seconds = time.perf_counter() - begun
            answers.append(
                {
                    "model": speaker.name,
                    "kind": speaker.kind,
                    "distilled_end_to_end": speaker.final,
                    "answer": found.text.rstrip(),
                    "tokens": found.tokens,
                    "finished": found.finished,
                    "seconds": round(seconds, 3),
                }
            )
        return {
            "prompt": question,
            "images": [str(file) for file in self.conversation.pictures],
            "system": self.conversation.system,
            # Where an answer ends is the tokenizer's, not the user's.
            "settings": {k: v for k, v in vars(self.settings).items() if k != "eos"},
            "answers": answers,
        }

    def ask(self, question: str) -> None:
        """One question, and its answers on stdout.

        In a terminal as in a conversation; elsewhere plain, behind `[name]` if several answer.
        """
        self.conversation.ask(question)
        if sys.stdout.isatty():
            self._answer()
            return
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                _write(f"[{speaker.name}] ")
            found = self._speak(speaker, _write)
            _write("\n")
            self.conversation.hear(speaker.name, found.text)
            self._warn_if_cut(speaker, found)

    def read_questions(self, lines: Iterable[str]) -> None:
        """Every line is a question or a command; what is wrong with one ends it all."""
        try:
            for number, line in enumerate(lines):
                # Editors of Windows begin a file of questions with a byte order mark.
                line = line.removeprefix("\ufeff") if number == 0 else line
                if not line.strip():
                    continue
                if line.startswith("/"):
                    self._command(line.strip())
                else:
                    self.ask(line.strip())
        except Leave:
            return
        except UnicodeDecodeError as error:
            raise DataError(
                "the questions are not valid UTF-8", "convert them, for example with iconv"
            ) from error

    def converse(self) -> None:
        """Questions from the terminal until Ctrl-D or /quit; twice Ctrl-C leaves with 130."""
        # Gives `input` a line that can be edited, and arrow keys to earlier ones.
        with suppress(ImportError):
            import readline  # noqa: F401
        self._introduce()
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                sys.stdout.write("\n")
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                if self._stop.pressed:
                    raise typer.Exit(INTERRUPTED) from None
                self._stop.pressed = True
                _remark("once more leaves")
                continue
            self._stop.pressed = False
            try:
                self._take(line)
            except Leave:
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                raise typer.Exit(INTERRUPTED) from None
            except MmmambaError as error:
                print_error(str(error))

    def _introduce(self) -> None:
        for speaker in self.speakers:
            weight = speaker.model.lm_head.weight
            size = speaker.model.num_parameters() / 1e6
            dtype = str(weight.dtype).removeprefix("torch.")
            _remark(
                f"{speaker.name}: {speaker.kind}, {size:,.1f} M parameters, {dtype} on "
                f"{weight.device.type}{'' if speaker.sees else ', text only'}"
            )
        if self.conversation.waiting:
            _remark(f"with {', '.join(file.name for file in self.conversation.waiting)}")
        _remark("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves")

    def _take(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/"):
            self._command(line.strip())
            return
        self.conversation.ask(line.strip())
        try:
            with self._stop.watched():
                self._answer()
        except BaseException:
            sys.stdout.write("\n")
            self.conversation.take_back()
            raise

    def _answer(self) -> None:
        """All answers, side by side where there is room, else one after the other."""
        from mmmamba_cli.chat import SideBySide, column_width

        columns = shutil.get_terminal_size().columns
        begun = time.perf_counter()
        width = column_width(columns, len(self.speakers))
        if len(self.speakers) > 1 and width is not None:
            table = SideBySide(self.conversation.names, width)
            _write(table.heading())
            answers = self._stream(self.speakers, table)
        else:
            answers = []
            for speaker in self.speakers:
                if len(self.speakers) > 1:
                    _write(f"── {speaker.name} ──\n")
                # Stopped is stopped: who has not spoken yet says nothing.
                alone = SideBySide((speaker.name,), max(NARROWEST, columns - 1))
                answers += self._stream((speaker,), alone)
        seconds = time.perf_counter() - begun
        for speaker, found in zip(self.speakers, answers, strict=True):
            self.conversation.hear(speaker.name, found.text)
            if not self._stop.pressed:
                self._warn_if_cut(speaker, found)
        tokens = sum(found.tokens for found in answers)
        stopped = "stopped; " if self._stop.pressed else ""
        _remark(f"{stopped}{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s")

    def _speak(self, speaker: ChatModel, write: Callable[[str], object]) -> Answer:
        from mmmamba_cli.chat import Answer

        found = Answer()
        for piece in speaker.answer(self.conversation, self.settings, found):
            write(piece)
        return found

    def _stream(self, speakers: Sequence[ChatModel], table: SideBySide) -> list[Answer]:
        """A token of each model in turn, each in its column."""
        from mmmamba_cli.chat import Answer

        answers = [Answer() for _ in speakers]
        streams = {
            column: speaker.answer(self.conversation, self.settings, answers[column])
            for column, speaker in enumerate(speakers)
        }
        while streams:
            for column in list(streams):
                piece = None if self._stop.pressed else next(streams[column], None)
                if piece is None:
                    del streams[column]
                    _write(table.end(column))
                else:
                    _write(table.add(column, printable(piece)))
        return answers

    def _warn_if_cut(self, speaker: ChatModel, found: Answer) -> None:
        if not found.finished:
            print_warning(
                f"{speaker.name}: cut after {found.tokens} tokens; --max-new-tokens allows more"
            )

    def _command(self, line: str) -> None:
        """Do what a line that begins with / says. Raises `Leave`, or `DataError`."""
        name, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if name in ("/image", "/save") and not rest:
            raise DataError(f"{name} needs a file", f"as in {name} FILE")
        match name:
            case "/image":
                _remark(self.show(Path(rest).expanduser()))
            case "/save":
                self.conversation.save(Path(rest).expanduser())
                _remark(f"saved {rest}")
            case "/reset":
                self.conversation.reset()
                _remark("the conversation begins anew")
            case "/history":
                self._print_history()
            case "/help":
                for typed, does in HELP.items():
                    _remark(f"{typed:<12} {does}")
            case "/quit":
                raise Leave
            case _:
                raise DataError(
                    f"there is no {name}", "/help lists commands; a question wants a space before /"
                )

    def _print_history(self) -> None:
        conversation = self.conversation
        for number, question in enumerate(conversation.questions):
            shown = "".join(f"[{file.name}] " for file in conversation.pictures_of(number))
            _write(f"you: {shown}{question}\n")
            for name in conversation.names:
                heard = conversation.answers[name]
                if number < len(heard):
                    _write(f"{name}: {printable(heard[number])}\n")


def blind(name: str, file: Path) -> DataError:
    """For a picture that is to be shown to a model without eyes."""
    return DataError(
        f"{name} reads text only, it cannot be shown {file}", "ask a model that has vision"
    )


def printable(text: str) -> str:
    """`text` without control characters but for newline and tab."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _remark(text: str) -> None:
    print_line(text, style="dim", to_stderr=True)
