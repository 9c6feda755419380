"""One answer, token by token, so that it can be shown, stopped, and set beside another model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmamba_cli.decoding import Generator, Settings
from mmmamba_cli.decoding.choosing import Chooser, ends_of
from mmmamba_cli.model import HolisticVLM, new_cache


def generate_ids(
    model: HolisticVLM,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    settings: Settings,
    turn: int = 0,
    generator: Generator | None = None,
) -> Iterator[int]:
    """The ids of an answer to input_ids (1, T), as they are made; the end is not handed on.

    The same tokens as `model.generate` takes greedily. Drawing depends on the seed and on `turn`,
    so that a question asked twice may be answered differently. `pixel_values` as in the model's
    forward. `generator` is the model's own and faster; None decodes any model by its forward.
    """
    settings = replace(settings, seed=(settings.seed + turn) % 2**63)
    if generator is None:
        ids = _forward(model, input_ids, pixel_values, settings)
    else:
        rows = generator.stream(input_ids, pixel_values, **vars(settings))
        ids = (token for (token,) in rows)
    ends = ends_of(settings, model.generation_config)
    for token in ids:
        if token in ends:
            return
        yield token


@dataclass
class _Row:
    """What a `Chooser` reads and writes, of one answer."""

    logits: Tensor
    ids: Tensor
    finished: Tensor


@torch.no_grad()
def _forward(
    model: HolisticVLM, input_ids: Tensor, pixel_values: Tensor | None, settings: Settings
) -> Iterator[int]:
    """What `Generator.stream` gives, by the model's forward."""
    cache = new_cache(model.config)
    logits = model(
        input_ids, pixel_values=pixel_values, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
    row = _Row(
        logits, input_ids[:, -1].clone(), torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    )
    chooser = Chooser(logits.shape[-1], logits.device)
    chooser.prepare(settings, model.generation_config)
    for count in range(settings.max_new_tokens):
        if count > 0:
            row.logits = model(row.ids.unsqueeze(1), past_key_values=cache).logits[:, -1]
        chooser.choose(row, settings.choice)
        yield int(row.ids)
