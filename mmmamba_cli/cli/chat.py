"""`mmmamba chat`: chat with one or several models in the terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import print_json, print_line, warn_not_final
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Device,
    DType,
    FromCurrent,
    Models,
    RunFolder,
    TeacherPath,
    complete_models,
)
from mmmamba_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmmamba_cli.chat import Settings
    from mmmamba_cli.cli.chat_session import ChatSession
    from mmmamba_cli.runs import ResolvedModel


def command(
    run: RunFolder = DEFAULT_RUN,
    product: FromCurrent = None,
    model: Models = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also ask this product, `teacher` or path, and show the answers side by side. "
            "May be repeated.",
            autocompletion=complete_models,
        ),
    ] = None,
    teacher: Annotated[
        bool,
        typer.Option("--teacher", help="Also ask the run's teacher; same as --compare teacher."),
    ] = False,
    teacher_path: TeacherPath = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Picture for the first question. May be repeated."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="System prompt (default: the model's own)."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Maximum length of an answer, in tokens.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 decodes greedily.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample from the most likely tokens with total probability P."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Sampling seed.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(metavar="QUESTION", help="Ask one question and exit.")
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Chat with one or several models about text and pictures.

    Answers are streamed. In a terminal, /help lists commands. Ctrl-C stops an answer, twice exits;
    Ctrl-D exits. From a pipe every line is a question, and answers go to stdout as plain text.
    """
    if as_json and prompt is None:
        raise DataError("--json needs a question", "give it with --prompt QUESTION")
    from mmmamba_cli.chat import Settings, resolve_models
    from mmmamba_cli.runs import Run

    settings = Settings(max_new_tokens, temperature, top_k, top_p, seed=seed)
    target = Run(run)
    wanted: list[str | Path] = [*([] if product is None else [product]), *(model or ())]
    others = [*(compare or ()), *(["teacher"] if teacher or teacher_path is not None else [])]
    if not wanted and len(compare or ()) < 2:
        wanted.append(target.record.current)
    found = resolve_models(target, [*wanted, *dict.fromkeys(others)], teacher_path)
    for one in found:
        if one.final is False:
            warn_not_final(one.name)
    session = _load_session(found, settings, system, image or (), device, dtype)
    if as_json:
        assert prompt is not None
        print_json(session.answer_as_json(prompt))
    elif prompt is not None:
        session.ask(prompt)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        session.run_interactive()
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Question files are UTF-8 in every locale.
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        session.read_questions(sys.stdin)


def _load_session(
    found: Sequence[ResolvedModel],
    settings: Settings,
    system: str | None,
    images: Sequence[Path],
    device: str | None,
    dtype: str,
) -> ChatSession:
    from mmmamba_cli.chat import Conversation, load_any_chat_model
    from mmmamba_cli.cli.chat_session import ChatSession, text_only_error

    conversation = Conversation(tuple(one.name for one in found), system)
    # Check pictures first: loading may take minutes.
    for file in images:
        conversation.add_picture(file)
        for one in found:
            if not one.has_vision:
                raise text_only_error(one.name, file)
    models = []
    for one in found:
        print_line(f"loading {one.name}", to_stderr=True)
        models.append(load_any_chat_model(one, device, dtype))
    return ChatSession(models, conversation, settings)
