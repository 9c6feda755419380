"""The next token from its logits, on the device, so that a captured graph can choose it.

Drawing divides probabilities by exponential noise and takes the largest: a sample from them without
a cumulative sum or a wait for the device. Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.decode import likeliest


@dataclass(frozen=True)
class Settings:
    """How an answer is made: at most `max_new_tokens` long, greedily at temperature 0.

    Else tokens are drawn with `seed` from the `top_k` likeliest, or from the likeliest that
    together have probability `top_p`, or from all. A row ends with one of `eos`: None is as in the
    model's generation config, () is never.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos: int | Collection[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed is {self.seed}, expected a whole number from 0 to 2^63 - 1")
        # A NaN is refused too.
        if not 0 <= self.temperature < math.inf:
            raise DataError(
                f"temperature is {self.temperature}, expected a number from 0 on",
                "0 always takes the likeliest token",
            )
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k is {self.top_k}, expected at least 1", "leave it out for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DataError(
                f"top_p is {self.top_p}, expected a number above 0 and at most 1",
                "leave it out for all",
            )
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise DataError(
                "top_k and top_p belong to drawing, but the temperature is 0",
                "give a temperature above 0, or neither",
            )

    @property
    def choice(self) -> Choice:
        nucleus = self.top_p is not None and self.top_p < 1
        return Choice(self.temperature > 0, self.top_k, nucleus)


@dataclass(frozen=True)
class Choice:
    """As much of `Settings` as changes what is launched; the numbers lie in a `Chooser`."""

    draws: bool
    top_k: int | None
    nucleus: bool


class Rows(Protocol):
    """What is chosen from and into: logits (B, V), ids (B,), finished (B,) for rows that ended."""

    logits: Tensor
    ids: Tensor
    finished: Tensor


class Chooser:
    """What choosing reads beside logits, in memory that stays: one for each model."""

    def __init__(self, vocabulary: int, device: torch.device):
        self.rng = torch.Generator(device)
        self.temperature = torch.ones(1, device=device)
        self.top_p = torch.ones(1, device=device)
        self.unwanted = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.pad = torch.zeros(1, dtype=torch.int64, device=device)

    def prepare(self, settings: Settings, config: Any) -> None:
        """Set all of it from settings and a generation config."""
        ends, unwanted = ends_of(settings, config), config.suppress_tokens or ()
        pad = config.pad_token_id
        self.rng.manual_seed(settings.seed)
        # Greedy choice does not read it.
        self.temperature.fill_(settings.temperature or 1.0)
        self.top_p.fill_(1.0 if settings.top_p is None else settings.top_p)
        self.pad.fill_(min(ends, default=0) if pad is None else pad)
        for table, ids in ((self.unwanted, unwanted), (self.ends, ends)):
            table.zero_()
            # Ids beyond the vocabulary never come up.
            table[[token for token in ids if 0 <= token < len(table)]] = True

    def choose(self, rows: Rows, choice: Choice) -> None:
        """Put the next token of each row into `rows.ids`; rows that have ended get padding."""
        if choice.draws:
            scores = rows.logits.float().masked_fill(self.unwanted, -math.inf)
            tokens = self._draw(scores, choice)
        else:
            tokens = likeliest(rows.logits, self.unwanted)
        tokens = torch.where(rows.finished, self.pad, tokens)
        rows.ids.copy_(tokens)
        rows.finished.logical_or_(self.ends[tokens])

    def _draw(self, scores: Tensor, choice: Choice) -> Tensor:
        # The highest is brought to 0 first: a tiny temperature would otherwise make infinities of
        # all.
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if choice.top_k is not None and choice.top_k < scores.shape[-1]:
            lowest = scores.topk(choice.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -math.inf)
        probabilities = scores.softmax(-1)
        if choice.nucleus:
            probabilities = self._nucleus(probabilities)
        noise = torch.empty_like(probabilities).exponential_(generator=self.rng)
        # Noise of exactly 0 would make NaN of a probability of 0.
        return (probabilities / noise.clamp_(min=torch.finfo(noise.dtype).tiny)).argmax(-1)

    def _nucleus(self, probabilities: Tensor) -> Tensor:
        """0 for tokens before which likelier ones reach `top_p` already (arXiv 1904.09751)."""
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= self.top_p, 0)
        return torch.zeros_like(kept).scatter_(-1, order, kept)


def ends_of(settings: Settings, config: Any) -> frozenset[int]:
    """Tokens that end a row, by settings and a generation config."""
    found = config.eos_token_id if settings.eos is None else settings.eos
    if found is None:
        return frozenset()
    return frozenset((found,) if isinstance(found, int) else found)
