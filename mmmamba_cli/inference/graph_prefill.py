"""Prefill by CUDA graphs, which saves the launch overhead of prompts that are short to compute.

Models without attention read a prompt in chunks of few fixed sizes (`ChunkGraphs`). A chunk depends
only on the states that the previous one left, so the same graph serves anywhere in a prompt; the
prompt is left-padded to whole chunks, which leaves all states unchanged.

Models with attention read the whole prompt at once, so that `is_causal=True` is enough
(`PromptGraphs`). It is right-padded to a multiple of 128 columns, which causal attention never sees
and the next tokens' keys and values overwrite; recurrent states ignore padding. Longer prompts hide
the launch overhead without a graph.

Legend: B batch, T columns of the prompt, N columns of the graph, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.inference.cuda_graphs import Capture, GraphCache
from mmmamba_cli.inference.decode_step import embed, prefill_stacks
from mmmamba_cli.inference.packed_mixer import ChunkPadding
from mmmamba_cli.inference.packed_model import PackedModel
from mmmamba_cli.inference.static_cache import PrefillCache, StaticCache
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.rope import depends_on_length
from mmmamba_cli.model.sequence_layout import StackState, next_layout

# Chunk sizes in tokens (batch x columns), largest first; larger chunks are faster per token. The
# remainder of a prompt is one chunk, a multiple of `PAD_CHUNK_TO` columns.
CHUNK_TOKENS = (16384, 4096)
PAD_CHUNK_TO = 512
MIN_CHUNK_COLUMNS = 64
# Longest prompt in tokens (batch x columns) that `PromptGraphs` runs, and the multiple of columns
# it is padded to.
MAX_GRAPH_TOKENS = 8192
PAD_PROMPT_TO = 128


class ChunkShape(NamedTuple):
    """Key of a chunk's graph: its columns, and whether some may be padding."""

    columns: int
    padded: bool


def supports_chunk_graphs(packed: PackedModel) -> bool:
    """Whether every mixer reads chunks over its packed weights, which needs no positions."""
    return all(layer.mixer.chunks for stack in packed.stacks for layer in stack.layers)


def split_prompt(length: int, padding: int, batch: int) -> list[ChunkShape]:
    """Chunks of a prompt of `length` columns, the first `padding` of which are padded in some row.

    The chunks may have more columns than the prompt; the difference is left padding.
    """
    rows = 1 << (batch - 1).bit_length()
    large = [max(MIN_CHUNK_COLUMNS, tokens // rows) for tokens in CHUNK_TOKENS]
    step = min(PAD_CHUNK_TO, large[-1])
    sizes, rest = [], length
    for columns in large:
        sizes += [columns] * (rest // columns)
        rest %= columns
    if rest:
        sizes.append(-(-rest // step) * step)
    sizes.sort()
    left_padding = sum(sizes) - length
    found, start = [], 0
    for columns in sizes:
        # A chunk without padding is slightly faster; small ones are not worth a second graph.
        found.append(ChunkShape(columns, columns < large[-1] or start < left_padding + padding))
        start += columns
    return found


class ChunkGraphs:
    """Prefill of `cache` in chunks, each captured by `capture` as its shape recurs."""

    def __init__(self, model: HolisticVLM, cache: StaticCache, capture: Capture):
        self._cache = cache
        self._graphs: GraphCache[ChunkShape, _Chunk] = GraphCache(
            lambda shape: _Chunk(model, cache, shape), capture
        )

    def accepts(self, length: int, mask: Tensor | None) -> bool:
        """True: all prompts run. See `GraphPrefill`."""
        return True

    def run(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """See `GraphPrefill`."""
        batch, length = inputs.shape[:2]
        padding = 0 if mask is None else int((~mask).sum(1).max())
        shapes = split_prompt(length, padding, batch)
        uses = Counter(shapes).items()
        # All captures come first: they overwrite the cache.
        graphs = {shape: self._graphs.get(shape, count) for shape, count in uses}
        left_padding = sum(shape.columns for shape in shapes) - length
        real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
        padded = ~F.pad(real, (left_padding, 0)).unsqueeze(-1)
        self._cache.clear()
        start = 0
        for shape in shapes:
            (chunk, run), stop = graphs[shape], start + shape.columns
            # The left padding is smaller than the first chunk.
            columns = inputs[:, max(0, start - left_padding) : stop - left_padding]
            chunk.set_inputs(embed(self._cache, columns))
            if chunk.padding is not None:
                chunk.padding.columns.copy_(padded[:, start:stop])
            run()
            start = stop
        self._cache.set_length(length)
        return chunk.last


class _Chunk:
    """Task of one chunk shape: inputs by `set_inputs` and `padding`, output in `last` (B, D).

    Running it may overwrite the inputs.
    """

    def __init__(self, model: HolisticVLM, cache: StaticCache, shape: ChunkShape):
        like, size = cache.packed.text_embedding, (cache.batch, shape.columns)
        self._blocks = model.model.blocks
        self._cache = cache
        self._hidden = like.new_zeros(*size, model.config.hidden_size)
        self.padding: ChunkPadding | None = None
        if shape.padded:
            self.padding = ChunkPadding(like.new_zeros(*size, 1, dtype=torch.bool))
        self.last = like.new_zeros(cache.batch, model.config.hidden_size)

    def set_inputs(self, hidden: Tensor) -> None:
        """Set inputs of the first layer (B, up to N, D), left-padded with zeros."""
        padding = self._hidden.shape[1] - hidden.shape[1]
        self._hidden[:, :padding].zero_()
        self._hidden[:, padding:].copy_(hidden)

    def __call__(self) -> None:
        no_columns = [None] * len(self._cache.stacks)
        hidden = prefill_stacks(
            self._cache, self._blocks, self._hidden, no_columns, None, self.padding
        )
        self.last.copy_(hidden[:, -1])


def supports_prompt_graphs(packed: PackedModel) -> bool:
    """Whether every mixer reads prompts that are padded on the right."""
    return all(layer.mixer.right_padding for stack in packed.stacks for layer in stack.layers)


class PromptGraphs:
    """Prefill of `cache` with whole unpadded prompts, captured by `capture` as lengths recur."""

    def __init__(self, model: HolisticVLM, cache: StaticCache, capture: Capture):
        self._cache = cache
        # One input buffer for all graphs: an evaluation has prompts of many lengths.
        inputs = cache.packed.text_embedding.new_zeros(MAX_GRAPH_TOKENS * model.config.hidden_size)
        self._graphs: GraphCache[int, _WholePrompt] = GraphCache(
            lambda columns: _WholePrompt(model, cache, columns, inputs), capture
        )

    def accepts(self, length: int, mask: Tensor | None) -> bool:
        """Whether the prompt is unpadded, short enough and fits the cache. See `GraphPrefill`."""
        columns = _padded_length(length)
        if mask is not None or columns * self._cache.batch > MAX_GRAPH_TOKENS:
            return False
        for stack in self._cache.stacks:
            config = stack.packed.config
            if stack.packed.has_attention and columns > stack.capacity:
                return False
            # Dynamic NTK: RoPE frequencies depend on the prompt length, so a captured graph does
            # not apply.
            if depends_on_length(config) and length > config.max_position_embeddings:
                return False
        return True

    def run(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """See `GraphPrefill`."""
        length = inputs.shape[1]
        prompt, run = self._graphs.get(_padded_length(length))
        self._cache.clear()
        prompt.set_inputs(embed(self._cache, inputs))
        run()
        self._cache.set_length(length)
        return prompt.last


class _WholePrompt:
    """Task of one padded prompt length: inputs by `set_inputs`, output in `last` (B, D)."""

    def __init__(self, model: HolisticVLM, cache: StaticCache, columns: int, inputs: Tensor):
        like, size = cache.packed.text_embedding, model.config.hidden_size
        self._blocks = model.model.blocks
        self._cache = cache
        self._hidden = inputs[: cache.batch * columns * size].view(cache.batch, columns, size)
        self._length = torch.ones(1, dtype=torch.int64, device=like.device)
        self._columns = [
            next_layout(
                stack.packed.config,
                StackState(),
                columns,
                mask=None,
                seq_idx=None,
                # RoPE frequencies of a short prompt; `accepts` excludes those that need others.
                prompt_lengths=self._length,
                device=like.device,
                dtype=like.dtype,
            )
            for stack in cache.stacks
        ]
        self.last = like.new_zeros(cache.batch, size)

    def set_inputs(self, hidden: Tensor) -> None:
        """Set inputs of the first layer (B, T, D) with T up to N, right-padded with zeros."""
        length = hidden.shape[1]
        self._hidden[:, :length].copy_(hidden)
        self._hidden[:, length:].zero_()
        self._length.fill_(length)

    def __call__(self) -> None:
        positions = torch.arange(self._hidden.shape[1], device=self._length.device)
        padding = ChunkPadding((positions >= self._length).view(1, -1, 1), self._length)
        module_cache = PrefillCache(self._cache)
        hidden = prefill_stacks(
            self._cache, self._blocks, self._hidden, self._columns, module_cache, padding
        )
        self.last.copy_(hidden.index_select(1, self._length - 1).squeeze(1))


def _padded_length(length: int) -> int:
    return -(-length // PAD_PROMPT_TO) * PAD_PROMPT_TO
