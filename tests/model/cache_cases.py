"""Models, prompts and filled caches of the tests of caches, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from small import join_pixels, small_model
from small import prompt as fp32_prompt
from torch import Tensor

from mmmamba_cli.model import new_cache

CLOSE = 1e-10
SHUFFLES = ["pre", "post"]
PLANS = ["aaaa", "mmmm", "amam", "maam"]
MORE = torch.tensor([[5, 17, 33]])


def model_of(plan: str, shuffle: str = "pre", **options: Any) -> Any:
    return small_model(plan, shuffle, **options).double()


def prompt(tiles: int, text: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    ids, pixels = fp32_prompt(tiles, text, seed)
    return ids, None if pixels is None else pixels.double()


def filled(model: Any, *parts: tuple[Tensor, Tensor | None], cache: Any = None) -> Any:
    """A cache filled with these parts in turn."""
    cache = new_cache(model.config) if cache is None else cache
    for ids, pixels in parts:
        model(ids, pixels, past_key_values=cache)
    return cache


def whole(*parts: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return torch.cat([ids for ids, _ in parts], 1), join_pixels([pixels for _, pixels in parts])
