"""Prefill: a prompt runs through the packed model in chunks, or by CUDA graphs.

Legend: B batch, T columns of the prompt, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.inference.decode_step import prefill_chunk
from mmmamba_cli.inference.static_cache import PrefillCache, StaticCache
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.prepared_inputs import PreparedInputs

# Chunk size in tokens (batch x columns) for models without attention; large enough on a GPU to hide
# the launch overhead. And the fewest columns of a chunk.
CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 4096, 16384
MIN_CHUNK_COLUMNS = 64
# With attention, an unpadded prompt of up to this many tokens is one chunk, whose mask is just
# `is_causal=True`. Other prompts are split so that a chunk's mask has at most this many entries.
MAX_WHOLE_PROMPT_TOKENS = 2**17
MAX_MASK_ENTRIES = 2**30


class GraphPrefill(Protocol):
    """Prefill of one static cache by CUDA graphs."""

    def accepts(self, length: int, mask: Tensor | None) -> bool:
        """Whether prompts of `length` columns with padding where `mask` (B, T) is False run."""
        ...

    def run(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Fill the cache; returns hidden states (B, D) of the last column, before the final norm.

        Args:
            inputs: ids (B, T) of text, or inputs of the first layer (B, T, D).
            mask: (B, T) bool, True for real columns, padding at the left; None without padding.
        """
        ...


def left_padding_mask(input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """The mask (B, T) as bool, True for real columns; None without padding.

    Raises:
        DataError: another shape than `input_ids`, or padding that is not on the left.
    """
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


def prefill(
    model: HolisticVLM,
    cache: StaticCache,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    mask: Tensor | None,
    chunk: int | None,
    graphs: GraphPrefill | None = None,
) -> Tensor:
    """Fill `cache` with a prompt; returns the logits (B, V) after its last column.

    Each chunk passes all stacks before the next one begins. Text is embedded chunk by chunk, so
    that no activation is as long as the prompt. `graphs` run the prompts they accept, unless a
    `chunk` is given or the embedding stack has more columns than the language stack.
    """
    decoder, length = model.model, input_ids.shape[1]
    is_text = decoder.find_images(input_ids, pixel_values) is None
    same_columns = is_text or not _expands_images(model)
    if graphs is not None and chunk is None and same_columns and graphs.accepts(length, mask):
        inputs = input_ids
        if not is_text:
            inputs = decoder.embed(decoder.prepare(input_ids, pixel_values, mask))
        hidden = graphs.run(inputs, mask)
        return cache.logits.copy_(model.lm_head(decoder.norm(hidden)))
    lengths = torch.full_like(input_ids[:, 0], length) if mask is None else mask.sum(1)
    default = _chunk_columns(cache, length, mask is not None)
    cache.clear()
    module_cache: Any = PrefillCache(cache)
    if is_text:
        step = chunk or default
        for columns in _chunks(length, step):
            chunk_mask = None if mask is None else mask[:, columns]
            prompt = decoder.prepare(
                input_ids[:, columns],
                None,
                chunk_mask,
                prompt_lengths=lengths,
                cache=module_cache,
            )
            hidden = _run_prompt(model, cache, prompt, module_cache, step)
    else:
        prompt = decoder.prepare(
            input_ids, pixel_values, mask, prompt_lengths=lengths, cache=module_cache
        )
        step = chunk or max(default, _min_chunk(prompt))
        hidden = _run_prompt(model, cache, prompt, module_cache, step)
    cache.finish_prefill(module_cache.decoding_state)
    logits: Tensor = model.lm_head(decoder.norm(hidden))
    return cache.logits.copy_(logits)


def _run_prompt(
    model: HolisticVLM, cache: StaticCache, prompt: PreparedInputs, module_cache: Any, chunk: int
) -> Tensor:
    """Hidden states (B, D) of the prompt's last column, before the final norm."""
    decoder = model.model
    blocks, split = decoder.blocks, decoder.num_embedding_layers
    first, last = cache.stacks[0], cache.stacks[-1]
    hidden = decoder.embed(prompt)
    embedding = prompt.embedding_layout
    if embedding is not None and prompt.expansion is not None:
        # The pixel shuffle merges columns of an image, so it needs all of them.
        parts = [
            prefill_chunk(
                first,
                blocks[:split],
                hidden[:, columns],
                embedding.chunk(columns.start, columns.stop),
                module_cache,
            )
            for columns in embedding.split(chunk)
        ]
        hidden, embedding = decoder.embedding_to_language(torch.cat(parts, dim=1), prompt), None
    # Both stacks have the same columns; the embedding stack has tiles if the language stack does.
    for columns in (embedding or prompt.language_layout).split(chunk):
        found = hidden[:, columns]
        if embedding is not None:
            described = embedding.chunk(columns.start, columns.stop)
            found = prefill_chunk(first, blocks[:split], found, described, module_cache)
            found = decoder.embedding_to_language(found, prompt)
        described = prompt.language_layout.chunk(columns.start, columns.stop)
        found = prefill_chunk(last, blocks[split:], found, described, module_cache)
    return found[:, -1]


def _min_chunk(prompt: PreparedInputs) -> int:
    """The smallest chunk that cuts no tile in either stack."""
    layouts = (prompt.embedding_layout, prompt.language_layout)
    return max(layout.min_chunk for layout in layouts if layout is not None)


def _expands_images(model: HolisticVLM) -> bool:
    """Whether an image has more columns in the embedding stack than in the language stack."""
    vision = model.config.vision_config
    return vision is not None and vision.pixel_shuffle == "post"


def _chunk_columns(cache: StaticCache, length: int, padded: bool) -> int:
    """Default columns of a chunk for a prompt of `length` columns."""
    if not cache.packed.has_attention:
        tokens = GPU_CHUNK_TOKENS if cache.logits.is_cuda else CPU_CHUNK_TOKENS
        return max(MIN_CHUNK_COLUMNS, tokens // cache.batch)
    if cache.batch * length <= MAX_WHOLE_PROMPT_TOKENS and not padded:
        return length
    return max(1, MAX_MASK_ENTRIES // (cache.batch * length))


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
