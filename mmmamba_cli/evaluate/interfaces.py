"""The model interface of the evaluation: any object with these methods can be evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmmamba_cli.evaluate.images import Picture


@dataclass(frozen=True)
class EvalPrompt:
    """One question as it is put to a model.

    `text` is the user's message. Its first `len(pictures)` occurrences of `<image>` are the
    pictures; further ones are plain text. `max_tiles` is the largest number of tiles of a picture,
    without its thumbnail. `choices` are the answers to rank by likelihood; empty for generation.
    `by_length`: the choices differ in length, so that likelihoods are compared per byte of UTF-8.
    """

    index: str
    text: str
    pictures: tuple[Picture, ...] = ()
    max_tiles: int | None = None
    choices: tuple[str, ...] = ()
    by_length: bool = False


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized prompt: `length` in tokens; `value` is private to the model."""

    prompt: EvalPrompt
    length: int
    value: Any = field(repr=False, default=None)


@dataclass(frozen=True)
class ModelIdentity:
    """Name and content hash of a model; `answers_depend_on`: dtype, device and configs."""

    name: str
    content_hash: str
    kind: str = ""
    # Whether the model was distilled end to end; None if unknown.
    final: bool | None = None
    answers_depend_on: dict[str, str] = field(default_factory=dict)
    # Whether the processor cuts pictures into at most `EvalPrompt.max_tiles` tiles.
    uses_max_tiles: bool = True


class EvalModel(Protocol):
    """A model that answers questions about pictures."""

    @property
    def identity(self) -> ModelIdentity: ...

    def prompt_length(self, prompt: EvalPrompt) -> int:
        """The approximate length of the encoded prompt in tokens, without decoding pixels."""
        ...

    def encode(self, prompt: EvalPrompt) -> EncodedPrompt:
        """Tokenize a prompt and preprocess its pictures; called from background threads."""
        ...

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch. Raises `OutOfMemory`."""
        ...

    def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        """Log-likelihoods of each prompt's choices, in nats. Raises `OutOfMemory`."""
        ...

    def max_batch_tokens(self, longest: EncodedPrompt, max_new_tokens: int) -> int | None:
        """The number of padded tokens of a batch that fits the device; None if unknown."""
        ...
