"""Numbers of SentencePiece ids of texts, as sums over words whose numbers are cached.

Counting the tokens of millions of texts then costs a look-up per word in place of an encoding. The
sums are exact where no piece goes beyond the beginning of a word: SentencePiece writes a space as
`▁`, and of the pieces that it learns from texts split at spaces none has a `▁` behind another
character, so that it encodes each word with the spaces before it for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor

SPACE_MARK = "▁"
# A space behind a word.
WORD_BREAK = re.compile(r"(?<=[^ ]) ")
# A piece that goes beyond the beginning of a word.
ACROSS_WORDS = re.compile(rf"[^{SPACE_MARK}]{SPACE_MARK}")
# About 50 MB.
MAX_CACHED_WORDS = 1 << 18


class WordLengths:
    """Counts the ids of texts. `encode` gives the ids of one, by the pieces of `model`."""

    def __init__(self, model: SentencePieceProcessor, encode: Callable[[str], Sequence[int]]):
        self._encode = encode
        self._is_additive = _words_are_independent(model)
        self._lengths: dict[str, int] = {}

    def count(self, text: str) -> int:
        """Number of ids of `encode(text)`."""
        # A text that ends with a space has a word without letters, which alone is no word.
        if not self._is_additive or text.endswith(" ") or SPACE_MARK in text:
            return len(self._encode(text))
        total, lengths = 0, self._lengths
        for word in WORD_BREAK.split(text):
            length = lengths.get(word)
            total += self._add(word) if length is None else length
        return total

    def _add(self, word: str) -> int:
        if len(self._lengths) >= MAX_CACHED_WORDS:
            self._lengths.clear()
        # The dummy prefix takes the place of the space before the word.
        length = self._lengths[word] = len(self._encode(word))
        return length


def _words_are_independent(model: SentencePieceProcessor) -> bool:
    """Whether the ids of a text are those of its words."""
    # Imports protobuf, which nothing else of a start needs.
    from sentencepiece import sentencepiece_model_pb2

    described: Any = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    normalizer, trainer = described.normalizer_spec, described.trainer_spec
    keeps_text = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    marks_begins = (
        normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not trainer.treat_whitespace_as_suffix
    )
    return (
        keeps_text
        and marks_begins
        and not any(ACROSS_WORDS.search(piece.piece) for piece in described.pieces)
    )
