"""What can be profiled: a subject, and the decoder it becomes once its weights are loaded.

A decoder with fused kernels, or one that replays a captured graph, is a further class that keeps
`Decoder`'s promises; measuring and reporting know nothing else of it. Legend: B batch, T tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# How a cache holds keys and values: anew with every token, as transformers' DynamicCache
# concatenates them, or in place, in room that was made for them.
GROWING, STATIC = "growing", "static"
CACHES = (GROWING, STATIC)

# The two baselines, and what is held against them.
AS_SHIPPED, TUNED, STUDENT = "teacher as shipped", "teacher with a static cache", "student"


class OutOfMemory(Exception):
    """A model, cache or prompt was too large for the device; its raiser holds no memory of it."""


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

    def start(self, batch: int, columns: int) -> None:
        """Begin with an empty cache, with room for so many columns where it does not grow."""

    def read(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """Prefill with ids (B, T); the logits (B, V) after the last.

        `chunk` columns at a time; None is as suits the model.
        """

    def fill(self, batch: int, columns: int, rng: torch.Generator) -> None:
        """Put the cache where reading so many columns would, with random contents."""

    def step(self, ids: Tensor) -> Tensor:
        """The logits (B, V) after one more token, (B, 1) ids."""

    def stop(self) -> None:
        """Let go of the cache."""

    def without_cache(self, ids: Tensor) -> Tensor:
        """The logits (B, T, V) of one forward pass that remembers nothing: the reference."""

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


@dataclass(frozen=True)
class Subject:
    """Something to measure, not loaded yet; `build` loads it and may raise `OutOfMemory`."""

    name: str
    about: About
    build: Callable[[], Decoder]
