"""Showing an answer while it is generated."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmmamba_cli.processing.tokenizer import REPLACEMENT_CHARACTER, HolisticVLMTokenizer


class TextStream:
    """Hands on the text of ids as they come: `model.generate(..., streamer=TextStream(...))`.

    What `write` is given, put together, is what decoding all ids at once gives; a character is
    handed on when its last byte is there. (transformers' own streamers start afresh at every line
    end, where a SentencePiece model with a dummy prefix loses the space that begins the next line.)
    """

    def __init__(
        self,
        tokenizer: HolisticVLMTokenizer,
        write: Callable[[str], object],
        *,
        skip_prompt: bool = True,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._write = write
        self._skip_prompt = skip_prompt
        self._at_start = True
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._written = 0

    def put(self, value: Tensor) -> None:
        """Take the ids of one sequence; the first are the prompt, as `generate` has it."""
        ids = value.flatten().tolist()
        is_prompt, self._at_start = self._at_start, False
        if is_prompt and self._skip_prompt:
            return
        self._ids += ids
        text = self._decode()
        # The bytes of an unfinished character; complete text never changes any more.
        self._hand_on(text[: len(text.rstrip(REPLACEMENT_CHARACTER))])

    def end(self) -> None:
        """Hand on the rest, and be ready for another answer."""
        self._hand_on(self._decode())
        self._ids, self._written, self._at_start = [], 0, True

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)

    def _hand_on(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)
