"""What the runner asks of a model. Anything with these methods can be evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmmamba_cli.evaluate.images import Picture


@dataclass(frozen=True)
class EvalPrompt:
    """One question as a model is asked it.

    `text` is what the user says; its first `<image>`, as many as there are pictures, stand for
    them, further ones are text. `max_tiles` is the most tiles of a picture, its thumbnail not
    counted. `choices` are the answers to choose from where answers are chosen by their likelihood,
    else empty.
    """

    index: str
    text: str
    pictures: tuple[Picture, ...] = ()
    max_tiles: int | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the model: `length` in tokens, `value` is the model's own affair."""

    prompt: EvalPrompt
    length: int
    value: Any = field(repr=False, default=None)


@dataclass(frozen=True)
class ModelIdentity:
    """Which model it is. `answers_depend_on` is what else of it changes answers: dtype, device."""

    name: str
    content_hash: str
    kind: str = ""
    # None where nobody says whether the model was distilled end to end.
    final: bool | None = None
    answers_depend_on: dict[str, str] = field(default_factory=dict)


class EvalModel(Protocol):
    """A model that answers questions about pictures."""

    @property
    def identity(self) -> ModelIdentity: ...

    def prompt_length(self, prompt: EvalPrompt) -> int:
        """The length in tokens that `encode` will give, or close to it; decodes no pixels."""
        ...

    def encode(self, prompt: EvalPrompt) -> EncodedPrompt:
        """Called in background threads."""
        ...

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        """An answer for each, greedily. Raises `OutOfMemory`."""
        ...

    def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        """Log-likelihood, in nats, of each prompt's choices as its answer. Raises `OutOfMemory`."""
        ...

    def max_batch_tokens(self, longest: EncodedPrompt, max_new_tokens: int) -> int | None:
        """Tokens of a whole padded batch that the device has room for; None if nobody knows."""
        ...
