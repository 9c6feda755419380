"""Conversations as a training loop wants them: ids, and which of them are an answer's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mmmamba_cli.processing.chat_template import TURN_END, TURN_START, Special
from mmmamba_cli.processing.image_processor import ImageProcessor

ANSWER_HEADER = "assistant\n"


class TrainingProcessor(Protocol):
    """What the data room asks of a model's processor."""

    @property
    def image_processor(self) -> ImageProcessor | None:
        """What tiles pictures; None for a model without vision."""
        ...

    @property
    def pad_token_id(self) -> int: ...

    def conversation_ids(
        self, messages: Sequence[Mapping[str, str]], num_tiles: Sequence[int]
    ) -> tuple[list[int], list[bool]]: ...

    def text_ids(self, text: str) -> list[int]: ...


def mark_answers(
    parts: Iterable[str | Special], encode: Any, special: Any
) -> Iterator[tuple[int, bool]]:
    """(id, whether it is an answer's) of each token of a rendered conversation.

    `encode(text)` and `special(token)` give ids. An answer is what the assistant says and the token
    that ends its turn. Header and answer are encoded as one text, so the answer begins where the
    ids of both stop agreeing with those of the header alone.
    """
    opened = answering = False
    for part in parts:
        if isinstance(part, Special):
            ends = part.token == TURN_END
            yield from [(special(part.token), answering and ends)] * part.times
            opened, answering = part.token == TURN_START, answering and not ends
            continue
        ids, known = encode(part), 0
        if opened and part.startswith(ANSWER_HEADER):
            answering = True
            known = _common_prefix(ids, encode(ANSWER_HEADER))
        yield from ((token, answering and i >= known) for i, token in enumerate(ids))
        opened = False


def _common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return i
    return min(len(one), len(two))
