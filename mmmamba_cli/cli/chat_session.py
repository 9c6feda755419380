"""The interactive chat session: input, slash commands, streamed output, interrupts."""

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
from mmmamba_cli.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from mmmamba_cli.chat import AnsweringModel, ChatAnswer, Conversation, Settings, SideBySide

PROMPT = "> "
# Cells of a line in a terminal that reports fewer.
MIN_COLUMNS = 8
COMMAND_HELP = {
    "/image FILE": "add a picture to the next question",
    "/reset": "forget the conversation",
    "/history": "print the conversation",
    "/save FILE": "write it as JSON Lines, the format of training data",
    "/quit": "exit; so does Ctrl-D",
    "/help": 'list commands; start a question that begins with "/" with a space',
}
# Control characters in an answer could move the cursor or reconfigure the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class EndOfChat(Exception):
    """The user ended the session."""


@dataclass
class _InterruptHandler:
    """Records the first Ctrl-C during an answer; the second one raises `KeyboardInterrupt`."""

    pressed: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGINT, self.handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


class ChatSession:
    """A conversation with one or several loaded models, on a terminal or a pipe."""

    def __init__(
        self, models: Sequence[AnsweringModel], conversation: Conversation, settings: Settings
    ) -> None:
        self.models = tuple(models)
        self.conversation = conversation
        self.settings = settings
        self._interrupt = _InterruptHandler()

    def add_picture(self, file: Path) -> str:
        """Add a picture to the next question; returns a line for the user."""
        for model in self.models:
            if not model.has_vision:
                raise text_only_error(model.name, file)
        width, height = self.conversation.add_picture(file)
        return f"{file.name}, {width} x {height}, goes with the next question"

    def answer_as_json(self, question: str) -> dict[str, Any]:
        """Answer one question; returns the record that --json prints."""
        self.conversation.ask(question)
        answers = []
        for model in self.models:
            start = time.perf_counter()
            answer = self._generate(model, lambda piece: None)
            seconds = time.perf_counter() - start
            answers.append(
                {
                    "model": model.name,
                    "kind": model.kind,
                    "distilled_end_to_end": model.final,
                    "answer": answer.text.rstrip(),
                    "tokens": answer.tokens,
                    "finished": answer.finished,
                    "seconds": round(seconds, 3),
                }
            )
        return {
            "prompt": question,
            "images": [str(file) for file in self.conversation.pictures],
            "system": self.conversation.system,
            # The stop tokens come from the tokenizer, not from the user.
            "settings": {k: v for k, v in vars(self.settings).items() if k != "eos"},
            "answers": answers,
        }

    def ask(self, question: str) -> None:
        """Ask one question and print the answers to stdout.

        A terminal shows them as in a conversation; a pipe gets plain text, after `[name]` if
        several models answer.
        """
        self.conversation.ask(question)
        if sys.stdout.isatty():
            self._answer()
            return
        for model in self.models:
            if len(self.models) > 1:
                _write(f"[{model.name}] ")
            answer = self._generate(model, _write)
            _write("\n")
            self.conversation.add_answer(model.name, answer.text)
            self._warn_if_truncated(model, answer)

    def read_questions(self, lines: Iterable[str]) -> None:
        """Run each line as a question or slash command; the first error ends the session."""
        try:
            for number, line in enumerate(lines):
                # Windows editors write a byte order mark first.
                line = line.removeprefix("\ufeff") if number == 0 else line
                if not line.strip():
                    continue
                if line.startswith("/"):
                    self._run_command(line.strip())
                else:
                    self.ask(line.strip())
        except EndOfChat:
            return
        except UnicodeDecodeError as error:
            raise DataError(
                "the questions are not valid UTF-8", "convert them, for example with iconv"
            ) from error

    def run_interactive(self) -> None:
        """Read questions from the terminal until Ctrl-D or /quit; exit with 130 on two Ctrl-C."""
        # Line editing and history for `input`.
        with suppress(ImportError):
            import readline  # noqa: F401
        self._print_introduction()
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                sys.stdout.write("\n")
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                if self._interrupt.pressed:
                    raise typer.Exit(INTERRUPTED) from None
                self._interrupt.pressed = True
                _print_status("press Ctrl-C again to exit")
                continue
            self._interrupt.pressed = False
            try:
                self._run_line(line)
            except EndOfChat:
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                raise typer.Exit(INTERRUPTED) from None
            except MmmambaError as error:
                print_error(str(error))

    def _print_introduction(self) -> None:
        for model in self.models:
            weight = model.model.get_output_embeddings().weight
            size = model.model.num_parameters() / 1e6
            dtype = str(weight.dtype).removeprefix("torch.")
            _print_status(
                f"{model.name}: {model.kind}, {size:,.1f} M parameters, {dtype} on "
                f"{weight.device.type}{'' if model.has_vision else ', text only'}"
            )
        if self.conversation.pending:
            _print_status(f"with {', '.join(file.name for file in self.conversation.pending)}")
        _print_status("/help lists commands; Ctrl-C stops an answer, Ctrl-D exits")

    def _run_line(self, line: str) -> None:
        if not line.strip():
            return
        if line.startswith("/"):
            self._run_command(line.strip())
            return
        self.conversation.ask(line.strip())
        try:
            with self._interrupt.installed():
                self._answer()
        except BaseException:
            sys.stdout.write("\n")
            self.conversation.undo()
            raise

    def _answer(self) -> None:
        """Stream all answers, side by side if the terminal is wide enough, else in turn."""
        from mmmamba_cli.chat import SideBySide, column_width

        columns = shutil.get_terminal_size().columns
        start = time.perf_counter()
        width = column_width(columns, len(self.models))
        if len(self.models) > 1 and width is not None:
            table = SideBySide(self.conversation.names, width)
            _write(table.heading())
            answers = self._stream(self.models, table)
        else:
            answers = []
            for model in self.models:
                if len(self.models) > 1:
                    _write(f"── {model.name} ──\n")
                # After an interrupt, the remaining models stay silent.
                alone = SideBySide((model.name,), max(MIN_COLUMNS, columns - 1))
                answers += self._stream((model,), alone)
        seconds = time.perf_counter() - start
        for model, answer in zip(self.models, answers, strict=True):
            self.conversation.add_answer(model.name, answer.text)
            if not self._interrupt.pressed:
                self._warn_if_truncated(model, answer)
        tokens = sum(answer.tokens for answer in answers)
        stopped = "stopped; " if self._interrupt.pressed else ""
        _print_status(f"{stopped}{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s")

    def _generate(self, model: AnsweringModel, write: Callable[[str], object]) -> ChatAnswer:
        from mmmamba_cli.chat import ChatAnswer

        answer = ChatAnswer()
        for piece in model.answer(self.conversation, self.settings, answer):
            write(piece)
        return answer

    def _stream(self, models: Sequence[AnsweringModel], table: SideBySide) -> list[ChatAnswer]:
        """Generate with all models at once, one token each in turn, each in its column."""
        from mmmamba_cli.chat import ChatAnswer

        answers = [ChatAnswer() for _ in models]
        streams = {
            column: model.answer(self.conversation, self.settings, answers[column])
            for column, model in enumerate(models)
        }
        while streams:
            for column in list(streams):
                piece = None if self._interrupt.pressed else next(streams[column], None)
                if piece is None:
                    del streams[column]
                    _write(table.end(column))
                else:
                    _write(table.add(column, printable(piece)))
        return answers

    def _warn_if_truncated(self, model: AnsweringModel, answer: ChatAnswer) -> None:
        if not answer.finished:
            print_warning(
                f"{model.name}: cut after {answer.tokens} tokens; --max-new-tokens allows more"
            )

    def _run_command(self, line: str) -> None:
        """Run a slash command. Raises `EndOfChat` or `DataError`."""
        name, _, rest = line.partition(" ")
        rest = rest.strip().strip("'\"")
        if name in ("/image", "/save") and not rest:
            raise DataError(f"{name} needs a file", f"as in {name} FILE")
        match name:
            case "/image":
                _print_status(self.add_picture(Path(rest).expanduser()))
            case "/save":
                self.conversation.save(Path(rest).expanduser())
                _print_status(f"saved {rest}")
            case "/reset":
                self.conversation.reset()
                _print_status("conversation reset")
            case "/history":
                self._print_history()
            case "/help":
                for usage, description in COMMAND_HELP.items():
                    _print_status(f"{usage:<12} {description}")
            case "/quit":
                raise EndOfChat
            case _:
                raise DataError(
                    f"there is no {name}",
                    '/help lists commands; start a question that begins with "/" with a space',
                )

    def _print_history(self) -> None:
        conversation = self.conversation
        for number, question in enumerate(conversation.questions):
            shown = "".join(f"[{file.name}] " for file in conversation.pictures_of(number))
            _write(f"you: {shown}{question}\n")
            for name in conversation.names:
                answers = conversation.answers[name]
                if number < len(answers):
                    _write(f"{name}: {printable(answers[number])}\n")


def text_only_error(name: str, file: Path) -> DataError:
    """The error for a picture given to a text-only model."""
    return DataError(
        f"{name} reads text only, it cannot be shown {file}", "ask a model that has vision"
    )


def printable(text: str) -> str:
    """Replace control characters except newline and tab."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_status(text: str) -> None:
    print_line(text, style="dim", to_stderr=True)
