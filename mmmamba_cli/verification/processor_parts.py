"""Tokenizer and processor of a teacher of transformers, opened from its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer

from mmmamba_cli.processing.quiet_loading import quiet_loading
from mmmamba_cli.verification.prompts import Encode, Inputs, Row
from mmmamba_cli.verification.steps import describe_exception

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# A package that is not installed, as an ImportError or a ValueError of transformers names it.
MISSING_PACKAGE = re.compile(
    r"requires (?:the )?`?([\w-]+)`? (?:to be installed|library)"
    r"|Missing optional dependencies: ([\w-]+)"
)


@dataclass(frozen=True)
class ProcessorParts:
    """What encodes a teacher's prompts, and why a part is not there.

    Attributes:
        tokenizer: None if there is none or it cannot be opened.
        processor: the processor of text and pictures; None for a language model, or likewise.
        tokenizer_problem, processor_problem: why they are None, as a sentence.
        is_damaged: whether a problem is a fault of the folder's files, rather than their absence
            or that of a package.
    """

    tokenizer: Any
    processor: Any
    tokenizer_problem: str | None = None
    processor_problem: str | None = None
    is_damaged: bool = False

    @property
    def renderer(self) -> Any:
        """What renders the chat template."""
        return self.tokenizer if self.processor is None else self.processor

    @property
    def template(self) -> Any:
        """The chat template: the processor's, else the tokenizer's; None without one."""
        templates = (getattr(one, "chat_template", None) for one in (self.renderer, self.tokenizer))
        return next((template for template in templates if template), None)

    def render(self, conversations: Any, **options: Any) -> Any:
        """`apply_chat_template` of the renderer, which may lack the template itself."""
        if not getattr(self.renderer, "chat_template", None):
            options["chat_template"] = self.template
        return self.renderer.apply_chat_template(conversations, **options)

    def encoder(self, use_template: bool) -> Encode:
        """The function that encodes rows, by the chat template or as bare text."""
        return _template_encoder(self) if use_template else _text_encoder(self)


def open_processor_parts(folder: Path, takes_pictures: bool) -> ProcessorParts:
    """Open the tokenizer of a folder, and its processor if the model takes pictures.

    A tokenizer without a padding token pads with its end token; padding is on the left. Code of the
    folder is never run.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing = f"there is no tokenizer in {folder}"
        return ProcessorParts(None, None, missing, missing)
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _padding_left(tokenizer)
    except Exception as error:  # noqa: BLE001  tokenizers raises plain `Exception`
        problem, is_damaged = _load_problem("tokenizer", error)
        return ProcessorParts(None, None, problem, "there is no tokenizer", is_damaged)
    if not takes_pictures:
        return ProcessorParts(tokenizer, None, None, "the model takes no pictures")
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        problem = f"there is neither {' nor '.join(PROCESSOR_FILES)} in {folder}"
        return ProcessorParts(tokenizer, None, None, problem)
    try:
        with quiet_loading():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        _padding_left(processor.tokenizer)
    except Exception as error:  # noqa: BLE001  processors of any family raise anything
        problem, is_damaged = _load_problem("processor", error)
        return ProcessorParts(tokenizer, None, None, problem, is_damaged)
    return ProcessorParts(tokenizer, processor)


def _padding_left(tokenizer: Any) -> None:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _load_problem(what: str, error: Exception) -> tuple[str, bool]:
    """Why a tokenizer or processor cannot be opened, and whether the folder is at fault."""
    message = " ".join(str(error).split())
    missing = MISSING_PACKAGE.search(message)
    if missing is not None:
        package = (missing[1] or missing[2]).lower()
        return f"the {what} needs {package}: pip install {package}", False
    return f"the {what} cannot be opened: {describe_exception(error)}", True


def _template_encoder(opened: ProcessorParts) -> Encode:
    batch = {"padding": True, "return_tensors": "pt"}

    def encode(rows: Sequence[Row]) -> Inputs:
        conversations = [messages_of(opened, row) for row in rows]
        found = opened.render(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            **(batch if opened.processor is None else {"processor_kwargs": batch}),
        )
        return dict(found)

    return encode


def _text_encoder(opened: ProcessorParts) -> Encode:
    def encode(rows: Sequence[Row]) -> Inputs:
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        if opened.processor is None:
            return dict(opened.tokenizer([row.words for row in rows], **options))
        mark = getattr(opened.processor, "image_token", "")
        texts = [mark * len(row.pictures) + row.words for row in rows]
        pictures = [list(row.pictures) for row in rows] if any(r.pictures for r in rows) else None
        return dict(opened.processor(text=texts, images=pictures, **options))

    return encode


def messages_of(opened: ProcessorParts, row: Row) -> list[dict[str, Any]]:
    """The conversation of a row; templates of language models take plain strings."""
    if opened.processor is None:
        return [{"role": "user", "content": row.words}]
    return row.messages
