"""Token ids of questions about pictures in the formats of HoVLE and of SmolVLM.

The questions of a lesson are branches that follow one prefix with the picture.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import sentencepiece
from tokenizers import Tokenizer

from mmmamba_cli.processing.chat_template import DEFAULT_SYSTEM
from mmmamba_evals.scenes.scene import Question

TOKENS_PER_TILE = 64


class Prompts(Protocol):
    """One chat format; `pad` fills rows."""

    pad: int

    def prefix(self, shown: str | None, tiles: int) -> list[int]:
        """Ids before the question: `shown` with a picture of `tiles` tiles for each `<image>`."""
        ...

    def text_prefix(self, text: str) -> list[int]:
        """Ids before the question for a text without pictures."""
        ...

    def branch(self, one: Question, after_text: bool) -> tuple[list[int], int]:
        """Ids of a question and its answer, and the number of answer tokens."""
        ...


class HovlePrompts:
    """HoVLE's chat template with a SentencePiece tokenizer."""

    pad = 2

    def __init__(self, model: bytes, special: dict[str, int]):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.special = special
        self._encode = lru_cache(maxsize=200_000)(self._encode_now)

    def prefix(self, shown: str | None, tiles: int) -> list[int]:
        special = self.special
        ids = [1, special["<|im_start|>"], *self._encode(f"system\n{DEFAULT_SYSTEM}")]
        ids += [special["<|im_end|>"], special["<|im_start|>"]]
        if shown is None:
            return ids
        before = "user\n"
        for index, part in enumerate(shown.split("<image>")):
            if index:
                ids += [special["<img>"], *[special["<IMG_CONTEXT>"]] * (tiles * TOKENS_PER_TILE)]
                ids.append(special["</img>"])
            if before + part:
                ids += self._encode(before + part)
            before = ""
        return ids

    def text_prefix(self, text: str) -> list[int]:
        return [*self.prefix(None, 0), *self._encode_now(f"user\n{text}")]

    def branch(self, one: Question, after_text: bool) -> tuple[list[int], int]:
        special = self.special
        # SentencePiece adds a space before every text; this one continues a text.
        asked = self._encode(f"\n{one.text}")[int(after_text) :]
        ids = [*asked, special["<|im_end|>"], special["<|im_start|>"]]
        # Encoded as one text, as in a conversation: no space before the answer's first piece.
        begun = self._encode("assistant\n")
        answered = self._encode(f"assistant\n{one.answer}")
        assert answered[: len(begun)] == begun
        return [*ids, *answered, special["<|im_end|>"]], len(answered) - len(begun) + 1

    def _encode_now(self, text: str) -> list[int]:
        return self.pieces.encode(text)


class SmolvlmPrompts:
    """SmolVLM's chat template without cropping: a picture is one tile."""

    def __init__(self, tokenizer: str):
        self.tokens = Tokenizer.from_str(tokenizer)
        self._encode = lru_cache(maxsize=200_000)(self._encode_now)
        (self.pad,) = self._encode("<|im_end|>")
        picture = "<image>" * TOKENS_PER_TILE
        around = "<fake_token_around_image>"
        self._picture = f"{around}<global-img>{picture}{around}"

    def prefix(self, shown: str | None, tiles: int) -> list[int]:
        if tiles > 1:
            raise ValueError(f"{tiles} tiles: a picture has one tile")
        text = "<|im_start|>User:" if shown is None else f"<|im_start|>User:{shown}"
        return self._encode(text.replace("<image>", self._picture))

    def text_prefix(self, text: str) -> list[int]:
        return self._encode_now(f"<|im_start|>User: {text}")

    def branch(self, one: Question, after_text: bool) -> tuple[list[int], int]:
        begun = "\n" if after_text else ""
        asked = self._encode(f"{begun}{one.text}<end_of_utterance>\nAssistant:")
        answered = self._encode(f" {one.answer}<end_of_utterance>")
        return [*asked, *answered], len(answered)

    def _encode_now(self, text: str) -> list[int]:
        return self.tokens.encode(text, add_special_tokens=False).ids
