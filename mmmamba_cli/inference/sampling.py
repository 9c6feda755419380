"""Sampling settings, and the selection of the next token on the device, inside a CUDA graph.

Sampling divides probabilities by exponential noise and takes the argmax (the exponential race form
of the Gumbel-max trick), which needs neither a cumulative sum nor a synchronization. Legend:
B batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.decode import greedy_argmax


@dataclass(frozen=True)
class Settings:
    """Length, sampling parameters and end tokens of an answer.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: 0 decodes greedily; above 0 samples.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the most likely tokens that together reach this probability.
        eos: tokens that end a row; None takes those of the generation config, () is none.
        seed: seed of the random numbers.

    Raises:
        DataError: a value out of range, or `top_k` or `top_p` at temperature 0.
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
        # Rejects NaN as well.
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
    def mode(self) -> SamplingMode:
        nucleus = self.top_p is not None and self.top_p < 1
        return SamplingMode(self.temperature > 0, self.top_k, nucleus)


@dataclass(frozen=True)
class SamplingMode:
    """The part of `Settings` that selects a different graph; values live in `Sampler` tensors."""

    do_sample: bool
    top_k: int | None
    nucleus: bool


class DecodeBuffers(Protocol):
    """Inputs and outputs of a `Sampler`: logits (B, V), ids (B,), finished (B,) bool."""

    logits: Tensor
    ids: Tensor
    finished: Tensor


class Sampler:
    """Samples next tokens; its parameters are tensors at fixed addresses, one set per model."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.rng = torch.Generator(device)
        self.temperature = torch.ones(1, device=device)
        self.top_p = torch.ones(1, device=device)
        self.suppressed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.is_eos = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.pad_id = torch.zeros(1, dtype=torch.int64, device=device)

    def configure(self, settings: Settings, config: Any) -> None:
        """Set all parameters from `settings` and a generation config, and seed `rng`."""
        eos, suppressed = eos_ids(settings, config), config.suppress_tokens or ()
        pad = config.pad_token_id
        self.rng.manual_seed(settings.seed)
        # Greedy decoding does not read the temperature.
        self.temperature.fill_(settings.temperature or 1.0)
        self.top_p.fill_(1.0 if settings.top_p is None else settings.top_p)
        self.pad_id.fill_(min(eos, default=0) if pad is None else pad)
        for table, ids in ((self.suppressed, suppressed), (self.is_eos, eos)):
            table.zero_()
            # Ignore ids beyond the vocabulary.
            table[[token for token in ids if 0 <= token < len(table)]] = True

    def sample(self, buffers: DecodeBuffers, mode: SamplingMode) -> None:
        """Write the next token of each row into `buffers.ids`; finished rows get padding."""
        if mode.do_sample:
            scores = buffers.logits.float().masked_fill(self.suppressed, -math.inf)
            tokens = self._draw(scores, mode)
        else:
            tokens = greedy_argmax(buffers.logits, self.suppressed)
        tokens = torch.where(buffers.finished, self.pad_id, tokens)
        buffers.ids.copy_(tokens)
        buffers.finished.logical_or_(self.is_eos[tokens])

    def _draw(self, scores: Tensor, mode: SamplingMode) -> Tensor:
        # Shift the maximum to 0 first: dividing by a tiny temperature would overflow to infinity.
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        if mode.top_k is not None and mode.top_k < scores.shape[-1]:
            lowest = scores.topk(mode.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -math.inf)
        probabilities = scores.softmax(-1)
        if mode.nucleus:
            probabilities = self._keep_nucleus(probabilities)
        noise = torch.empty_like(probabilities).exponential_(generator=self.rng)
        # Noise of exactly 0 would turn a probability of 0 into NaN.
        return (probabilities / noise.clamp_(min=torch.finfo(noise.dtype).tiny)).argmax(-1)

    def _keep_nucleus(self, probabilities: Tensor) -> Tensor:
        """Zero the tokens outside the nucleus of probability `top_p` (arXiv 1904.09751)."""
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= self.top_p, 0)
        return torch.zeros_like(kept).scatter_(-1, order, kept)


def eos_ids(settings: Settings, config: Any) -> frozenset[int]:
    """End-of-sequence ids: those of `settings`, or of the generation config if it has none."""
    found = config.eos_token_id if settings.eos is None else settings.eos
    if found is None:
        return frozenset()
    return frozenset((found,) if isinstance(found, int) else found)
