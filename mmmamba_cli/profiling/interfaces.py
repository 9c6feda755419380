"""Interfaces of the profiler: a subject, and the decoder it loads.

The benchmark and the report use nothing else, so any implementation of `Decoder` can be profiled.
Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# How a cache stores keys and values: concatenated with every token, as in transformers'
# DynamicCache, or written in place into preallocated memory.
GROWING, STATIC = "growing", "static"
CACHES = (GROWING, STATIC)

# How a token is decoded: one launch per operation, by `mmmamba_cli.inference`, or one launch per
# operation by a class of transformers.
EAGER, GENERATOR, TRANSFORMERS = "eager", "generator", "transformers"

# Roles: the baselines, and the models compared with them.
AS_SHIPPED, TUNED, STUDENT = "teacher as shipped", "teacher tuned", "student"
STATIC_TEACHER = "teacher with a static cache"
BASELINES = (AS_SHIPPED, STATIC_TEACHER, TUNED)


@dataclass(frozen=True)
class Cost:
    """Lower bound of the work: bytes read or written, and operations of matrix products."""

    bytes: int
    operations: int


class Decoder(Protocol):
    """A loaded model with its own cache, which is empty until `start`."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights this decoder reads, including those shared with other decoders."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys, values and states held now."""

    def random_prompt(self, batch: int, length: int, rng: torch.Generator) -> Tensor:
        """Random text, ids (B, T)."""

    def cost(self, batch: int, context: int, prefill: bool) -> Cost:
        """Cost of one decode step after `context` tokens, or of their prefill."""

    def start(self, batch: int, columns: int) -> None:
        """Start with an empty cache; a static one gets room for `columns` columns."""

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        """Prefill with ids (B, T) after `start`; return the last logits (B, V).

        `chunk` is the chunk size in columns; by default the decoder chooses it.
        """

    def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
        """Fill the cache with random contents, as a prefill of `columns` tokens would leave it.

        Called after `start` and followed by `decode`.
        """

    def step(self, ids: Tensor) -> Tensor:
        """Return the logits (B, V) after one more token, ids (B, 1); called after `prefill`.

        The next step may overwrite the returned tensor.
        """

    def decode(self, count: int) -> Tensor:
        """Decode `count` tokens greedily after `fill_random`; return the last ids (B, 1).

        Synchronizes no more than decoding requires.
        """

    def release(self) -> None:
        """Free the cache."""

    def forward_without_cache(self, ids: Tensor, last: int) -> Tensor:
        """Logits (B, last, V) of the last columns, by one forward pass without a cache."""

    def in_fp32(self) -> Decoder:
        """This decoder over an fp32 copy of its weights.

        Raises:
            OutOfMemory: if the copy does not fit.
        """

    def variants(self) -> Mapping[str, Decoder]:
        """Other decoders of these weights by name, whose logits must agree with the reference."""


@dataclass(frozen=True)
class SubjectInfo:
    """Description of a subject. The fields appear in a profile's JSON, see `result.SubjectPart`."""

    role: str
    cache: str
    # "linear", "hybrid (4 attention)" or "all attention".
    kind: str
    attention_layers: tuple[int, ...]
    num_layers: int
    # "random", or the path of the weights.
    weights: str
    content_hash: str | None = None
    # Whether the model was distilled end to end; None if unknown.
    final: bool | None = None
    # EAGER, GENERATOR or TRANSFORMERS.
    way: str = EAGER
    # "int8" if the weights are narrower than the profile's dtype.
    precision: str | None = None
    # Names of the mixers of the layers that are not attention.
    mixers: tuple[str, ...] = ()
    # Why a student is decoded eagerly though the others are not; None otherwise.
    eager_reason: str | None = None


@dataclass(frozen=True)
class Subject:
    """A model to profile, not loaded yet; `build` loads it and may raise `OutOfMemory`."""

    name: str
    info: SubjectInfo
    build: Callable[[], Decoder]
