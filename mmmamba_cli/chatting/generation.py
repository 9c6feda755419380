"""One answer, token by token, so that it can be shown, stopped, and set beside another model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.model import HolisticVLM, new_cache


@dataclass(frozen=True)
class Settings:
    """How answers are made: greedily at temperature 0, else drawn with `seed`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"--max-new-tokens is {self.max_new_tokens}, expected at least 1")
        # A NaN is refused too.
        if not 0 <= self.temperature < float("inf"):
            raise DataError(
                f"--temperature is {self.temperature}, expected a number from 0 on",
                "0 always takes the likeliest token",
            )
        if not 0 <= self.seed < 2**63:
            raise DataError(f"--seed is {self.seed}, expected a whole number from 0 to 2^63 - 1")


@torch.no_grad()
def generate_ids(
    model: HolisticVLM,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    settings: Settings,
    stops: frozenset[int],
    turn: int = 0,
) -> Iterator[int]:
    """The ids of an answer to input_ids (1, T), as they are made; the stop token is not handed on.

    The same tokens as `model.generate` takes greedily. Drawing depends on the seed and on `turn`,
    so that a question asked twice may be answered differently. `pixel_values` as in the model's
    forward.
    """
    cache = new_cache(model.config)
    rng = torch.Generator().manual_seed((settings.seed + turn) % 2**63)
    unwanted = model.generation_config.suppress_tokens
    logits = model(
        input_ids, pixel_values=pixel_values, past_key_values=cache, logits_to_keep=1
    ).logits[0, -1]
    for count in range(settings.max_new_tokens):
        token = _choose(logits, unwanted, settings.temperature, rng)
        if token in stops:
            return
        yield token
        if count + 1 < settings.max_new_tokens:
            column = torch.tensor([[token]], device=input_ids.device)
            logits = model(column, past_key_values=cache).logits[0, -1]


def _choose(
    logits: Tensor, unwanted: list[int] | None, temperature: float, rng: torch.Generator
) -> int:
    """One token by logits (V,)."""
    scores = logits.float()
    if unwanted:
        scores[unwanted] = float("-inf")
    if temperature == 0:
        return int(scores.argmax())
    # On the CPU, so that a seed means the same on every device. The highest is brought to 0 first:
    # a tiny temperature would otherwise make infinities of all.
    scores = (scores.cpu() - scores.max().cpu()) / temperature
    return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=rng))
