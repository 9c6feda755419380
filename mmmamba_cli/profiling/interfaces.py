"""What can be profiled: a subject, and the decoder it becomes once its weights are loaded.

Whatever keeps `Decoder`'s promises can be measured; measuring and reporting know nothing else of
it. Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# How a cache holds keys and values: anew with every token, as transformers' DynamicCache
# concatenates them, or in place, in room that was made for them.
GROWING, STATIC = "growing", "static"
CACHES = (GROWING, STATIC)

# How a token is made: one launch for every operation, or by `mmmamba_cli.inference`.
EAGER, GENERATOR = "eager", "generator"

# The baselines, and what is held against them.
AS_SHIPPED, TUNED, STUDENT = "teacher as shipped", "teacher tuned", "student"
STATIC_TEACHER = "teacher with a static cache"
BASELINES = (AS_SHIPPED, STATIC_TEACHER, TUNED)


class OutOfMemory(Exception):
    """A model, cache or prompt was too large for the device; its raiser holds no memory of it.

    `hopeless`: an empty device would be too small as well.
    """

    def __init__(self, message: str, hopeless: bool = False):
        super().__init__(message)
        self.hopeless = hopeless


@dataclass(frozen=True)
class Cost:
    """What cannot be done without: bytes read or written, and operations of matrix products."""

    bytes: int
    operations: int


class Decoder(Protocol):
    """A loaded model with one cache of its own, empty until `start`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def weight_bytes(self) -> int:
        """Of the weights this decoder reads, also where another decoder shares them."""

    @property
    def cache_bytes(self) -> int:
        """Of keys, values and states as they are held now."""

    def prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        """Random text, (B, T) ids."""

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        """Of one more token of each row after `context` others, or of reading these."""

    def start(self, batch: int, columns: int) -> None:
        """Begin with an empty cache, with room for so many columns where it does not grow."""

    def read(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """Prefill with ids (B, T) after `start`; the logits (B, V) after the last.

        `chunk` columns at a time; None is as suits the model.
        """

    def fill(self, batch: int, columns: int, rng: torch.Generator) -> None:
        """After `start`: put the cache where reading so many columns would, with random contents.

        `tokens` comes next.
        """

    def step(self, ids: Tensor) -> Tensor:
        """The logits (B, V) after one more token, (B, 1) ids; after `read`.

        The next step may write into the same tensor.
        """

    def tokens(self, count: int) -> Tensor:
        """So many tokens, each the likeliest after the one before; the last ids (B, 1).

        After `fill`. Waits for the device no more than decoding has to.
        """

    def stop(self) -> None:
        """Let go of the cache."""

    def without_cache(self, ids: Tensor, last: int) -> Tensor:
        """The logits (B, last, V) behind the last columns, of a forward pass without a cache."""

    def in_fp32(self) -> Decoder:
        """The same over a copy of its weights in fp32; raises `OutOfMemory` without room for it."""

    def ways(self) -> Mapping[str, Decoder]:
        """By name, other decoders over these weights whose logits must be the reference's too."""


@dataclass(frozen=True)
class About:
    """What a subject is, for the reader of a result."""

    role: str
    cache: str
    # "linear", "hybrid (4 attention)" or "all attention".
    kind: str
    attention_layers: tuple[int, ...]
    num_layers: int
    # "random", or where they are.
    weights: str
    content_hash: str | None = None
    # None where nobody says whether the model was distilled end to end.
    final: bool | None = None
    # EAGER or GENERATOR.
    way: str = EAGER
    # "int8" where the weights are narrower than the profile's dtype.
    precision: str | None = None


@dataclass(frozen=True)
class Subject:
    """Something to measure, not loaded yet; `build` loads it and may raise `OutOfMemory`."""

    name: str
    about: About
    build: Callable[[], Decoder]
