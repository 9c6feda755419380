"""Streaming detokenizer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmmamba_cli.processing.tokenizer import REPLACEMENT_CHARACTER, HolisticVLMTokenizer


class TextStream:
    """Stream decoded text to `write`: `model.generate(..., streamer=TextStream(...))`.

    The concatenated output equals the decoding of all ids at once; a character is written with its
    last byte. (transformers' streamers restart decoding at every line end, where a SentencePiece
    model with a dummy prefix loses the space that begins the next line.)
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
        """Add ids of one sequence; the first call holds the prompt, as in `generate`."""
        ids = value.flatten().tolist()
        is_prompt, self._at_start = self._at_start, False
        if is_prompt and self._skip_prompt:
            return
        self._ids += ids
        text = self._decode()
        # Hold back the bytes of an incomplete character; complete text does not change.
        self._write_new(text[: len(text.rstrip(REPLACEMENT_CHARACTER))])

    def end(self) -> None:
        """Write the rest and reset for the next answer."""
        self._write_new(self._decode())
        self._ids, self._written, self._at_start = [], 0, True

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)

    def _write_new(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)
