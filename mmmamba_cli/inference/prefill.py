"""Reading a prompt in parts, into memory that stays where it is.

Legend: B batch, T columns of the prompt, D hidden size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.inference.decode_step import read_part
from mmmamba_cli.inference.static_cache import PrefillCache, States
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.prepared_inputs import PreparedInputs

# Tokens at a time, of all rows, of a model whose memory does not grow: on a GPU so many that it
# computes for longer than the host takes to say what. And columns, at least.
CHUNK, GPU_CHUNK, LEAST_CHUNK = 4096, 16384, 64
# With attention the prompt passes whole: only there is a causal flag all of the mask. Longer ones,
# and padded ones, are cut so that the mask of a part has no more entries than this.
WHOLE = 2**17
MASK_ENTRIES = 2**30


class Reader(Protocol):
    """Reads prompts into memory by graphs."""

    def takes(self, length: int, mask: Tensor | None) -> bool:
        """Whether it reads prompts of so many columns, padded where `mask` (B, T) is False."""
        ...

    def read(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, D) of the prompt's last column, before the norm.

        Args:
            inputs: ids (B, T) of text, or what the first layer sees (B, T, D).
            mask: (B, T) bool, which columns are real, all padding at the left; None if all are.
        """
        ...


def real_columns(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """(B, T) bool, or None if nothing is padding. Raises `DataError` unless padding is at the left.

    Decoding goes on at the right, where every row has to end with a real token.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask is {tuple(attention_mask.shape)}, but input_ids are "
            f"{tuple(input_ids.shape)}",
            "give a mask of the whole prompt and nothing else",
        )
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1].all()):
        raise DataError(
            "a row of attention_mask has padding at its right or within, or no token at all",
            "pad prompts on the left, as the processor does",
        )
    return mask


def extra_columns(model: HolisticVLM, input_ids: Tensor, pixel_values: Tensor | None) -> int:
    """Columns that the embedding stack will see beyond the language stack's.

    With the pixel shuffle behind it, it sees every patch of a tile.
    """
    vision = model.config.vision_config
    if pixel_values is None or vision is None or not _widens(model):
        return 0
    longest = int((input_ids == vision.image_token_id).sum(1).max())
    return longest * (vision.merge**2 - 1)


def _widens(model: HolisticVLM) -> bool:
    """Whether a picture has more columns in the embedding stack than in the other."""
    vision = model.config.vision_config
    return vision is not None and vision.pixel_shuffle == "post"


def pick_chunk(states: States, length: int, padded: bool) -> int:
    """Columns of a prompt that pass the stacks at a time."""
    if not states.plan.grows:
        tokens = GPU_CHUNK if states.logits.is_cuda else CHUNK
        return max(LEAST_CHUNK, tokens // states.batch)
    if states.batch * length <= WHOLE and not padded:
        return length
    return max(1, MASK_ENTRIES // (states.batch * length))


def read(
    model: HolisticVLM,
    states: States,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    mask: Tensor | None,
    chunk: int | None,
    reader: Reader | None = None,
) -> Tensor:
    """Put the prompt into `states`; the logits (B, V) after its last column.

    Each part goes through both stacks before the next one begins. Text is looked at part by part,
    so that nothing is as long as the prompt but what it leaves behind. A `reader` reads what it
    takes, but for prompts with an asked `chunk`, or with more columns in the embedding stack.
    """
    decoder, length = model.model, input_ids.shape[1]
    is_text = decoder.find_images(input_ids, pixel_values) is None
    is_even = is_text or not _widens(model)
    if reader is not None and chunk is None and is_even and reader.takes(length, mask):
        inputs = input_ids
        if not is_text:
            inputs = decoder.embed(decoder.prepare(input_ids, pixel_values, mask))
        hidden = reader.read(inputs, mask)
        return states.logits.copy_(model.lm_head(decoder.norm(hidden)))
    lengths = torch.full_like(input_ids[:, 0], length) if mask is None else mask.sum(1)
    step = chunk or pick_chunk(states, length, mask is not None)
    states.clear()
    cache: Any = PrefillCache(states)
    if is_text:
        for start in range(0, length, step):
            part = slice(start, start + step)
            seen = None if mask is None else mask[:, part]
            ids = input_ids[:, part]
            prompt = decoder.prepare(ids, None, seen, prompt_lengths=lengths, cache=cache)
            hidden = _last(model, states, prompt, cache, step)
    else:
        prompt = decoder.prepare(input_ids, pixel_values, mask, prompt_lengths=lengths, cache=cache)
        hidden = _last(model, states, prompt, cache, step)
    states.settle(cache.decoding_state)
    logits: Tensor = model.lm_head(decoder.norm(hidden))
    return states.logits.copy_(logits)


def _last(
    model: HolisticVLM, states: States, prompt: PreparedInputs, cache: Any, chunk: int
) -> Tensor:
    """Hidden states (B, D) of the prompt's last column, before the norm."""
    decoder = model.model
    blocks, split = decoder.blocks, decoder.num_embedding_layers
    first, last = states.stacks[0], states.stacks[-1]
    hidden = decoder.embed(prompt)
    both = prompt.embedding_layout
    if both is not None and prompt.expansion is not None:
        # All columns of an image are there before any of them is merged.
        parts = [
            read_part(
                first, blocks[:split], hidden[:, part], both.chunk(part.start, part.stop), cache
            )
            for part in _parts(both.length, chunk)
        ]
        hidden, both = decoder.embedding_to_language(torch.cat(parts, dim=1), prompt), None
    for part in _parts(prompt.language_layout.length, chunk):
        found = hidden[:, part]
        if both is not None:
            found = read_part(
                first, blocks[:split], found, both.chunk(part.start, part.stop), cache
            )
            found = decoder.embedding_to_language(found, prompt)
        seen = prompt.language_layout.chunk(part.start, part.stop)
        found = read_part(last, blocks[split:], found, seen, cache)
    return found[:, -1]


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
