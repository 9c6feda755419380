"""The text that stability is measured on, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from mmmamba_cli.data import Sample, open_corpus
from mmmamba_cli.errors import DataError

SAMPLE_TEXT = "sample_text.txt"
DEFAULT_TOKENS = 4096
# Fewer tokens show no length.
MIN_TOKENS = 64
# No tokenizer makes longer tokens on average.
CHARACTERS_PER_TOKEN = 16


def sample_text() -> str:
    """The text that is installed with mmmamba: pages of its documentation."""
    return files(__package__).joinpath(SAMPLE_TEXT).read_text(encoding="utf-8-sig")


def read_text(file: Path) -> str:
    """Raises `DataError` if the file cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not text in UTF-8 (byte {error.start})", "give another file with --text"
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{file} cannot be read: {reason}", "check --text") from error


def conversation_text(source: Path, tokens: int | None) -> str:
    """The words of conversations without their pictures, enough for `tokens` tokens if there are.

    `tokens` is as in `encode_text`.
    Raises `DataError` as `open_corpus`.
    """
    corpus = open_corpus(source)
    parts: list[str] = []
    enough = CHARACTERS_PER_TOKEN * (DEFAULT_TOKENS if tokens is None else tokens)
    length = 0
    for index in range(len(corpus)):
        if length >= enough:
            break
        parts.append(_words(corpus[index]))
        length += len(parts[-1])
    return "\n\n".join(parts)


def _words(sample: Sample) -> str:
    if sample.text is not None:
        return sample.text
    found = []
    for message in sample.messages:
        content = message["content"]
        pieces = [content] if isinstance(content, str) else [part.get("text") for part in content]
        found.append(" ".join(piece.replace("<image>", "") for piece in pieces if piece).strip())
    return "\n".join(found)


class TextEncoder(Protocol):
    """What turns a text into token ids; processors of `HolisticVLM` do."""

    def text_ids(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class TokenizerEncoder:
    """A `TextEncoder` of a tokenizer of transformers; it adds no special tokens."""

    tokenizer: Any

    def text_ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def encode_text(processor: TextEncoder, text: str, name: str, tokens: int | None) -> list[int]:
    """The first `tokens` ids of a text; None takes up to `DEFAULT_TOKENS`.

    Raises `DataError` for a text that is too short, or too few tokens.
    """
    if tokens is not None and tokens < MIN_TOKENS:
        raise DataError(f"{tokens} tokens are too few to measure", f"give {MIN_TOKENS} or more")
    ids = processor.text_ids(text)
    needed = MIN_TOKENS if tokens is None else tokens
    if len(ids) < needed:
        raise DataError(
            f"{name} has {len(ids):,} tokens, expected at least {needed:,}",
            "give a longer text" if tokens is None else "give a longer text, or less --tokens",
        )
    return ids[: DEFAULT_TOKENS if tokens is None else tokens]
