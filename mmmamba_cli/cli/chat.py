"""`mmmamba chat`: talk to a model in the terminal, or to several at once."""

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
    from mmmamba_cli.cli.chat_session import Talk
    from mmmamba_cli.runs import ResolvedModel


def command(
    run: RunFolder = DEFAULT_RUN,
    product: FromCurrent = None,
    model: Models = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Ask this product (or `teacher`, or a path) too, and show both answers side by "
            "side. May be repeated.",
            autocompletion=complete_models,
        ),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Ask the run's teacher too: --compare teacher.")
    ] = False,
    teacher_path: TeacherPath = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Picture for the first question. May be repeated."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="System text; the model's own if not given."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; above 0 draws.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Draw from the K likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Draw from the likeliest tokens that together have P."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what is drawn.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(metavar="QUESTION", help="Ask this one question, and end.")
    ] = None,
    device: Device = None,
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Talk to a model, about pictures too; its answers are shown as they come.

    In a terminal /help lists what else can be typed. Ctrl-C stops an answer, twice leaves; Ctrl-D
    leaves. From a pipe every line is a question, and answers are plain on stdout.
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
    places = resolve_models(target, [*wanted, *dict.fromkeys(others)], teacher_path)
    _warn(places)
    talk = _open(places, settings, system, image or (), device, dtype)
    if as_json:
        assert prompt is not None
        print_json(talk.as_record(prompt))
    elif prompt is not None:
        talk.ask(prompt)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        talk.converse()
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Files of questions are UTF-8, whatever the locale.
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        talk.read_questions(sys.stdin)


def _warn(places: Sequence[ResolvedModel]) -> None:
    for where in places:
        if where.final is False:
            warn_not_final(where.name)


def _open(
    places: Sequence[ResolvedModel],
    settings: Settings,
    system: str | None,
    images: Sequence[Path],
    device: str | None,
    dtype: str,
) -> Talk:
    from mmmamba_cli.chat import Conversation, load_chat_model
    from mmmamba_cli.cli.chat_session import Talk, blind

    conversation = Conversation(tuple(where.name for where in places), system)
    # Before minutes are spent on loading.
    for file in images:
        conversation.add_picture(file)
        for where in places:
            if where.checkpoint.config.vision is None:
                raise blind(where.name, file)
    speakers = []
    for where in places:
        print_line(f"loading {where.name}", to_stderr=True)
        speakers.append(load_chat_model(where, device, dtype))
    return Talk(speakers, conversation, settings)
