"""The whole decoder: patches and text, embedding stack, language stack, final norm.

`prepare` looks at the inputs once and says what each stack will see; `embed`, `run` and `bridge`
are the steps between, so that a layer-local training loop can walk the same path as `forward`.
Legend: B batch, T columns of the prompt, E columns the embedding stack sees, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from mmmamba_cli.errors import DataError
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.cache import (
    DecodingState,
    HybridCache,
    decoding_state,
    new_cache,
    widen_static_layers,
)
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.layout import Expansion, count_tiles, expand, new_tiles
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.sequence import Columns, describe_columns
from mmmamba_cli.model.vision import Vision


@dataclass(frozen=True)
class Prompt:
    """Inputs as the stacks will see them; made by `HolisticDecoder.prepare`."""

    input_ids: Tensor
    pixel_values: Tensor | None
    # (B, T) bool, or None where there is no image to place.
    is_image: Tensor | None
    # None unless the embedding stack sees more columns than the language stack.
    expansion: Expansion | None
    # None for a plain language model.
    embedding: Columns | None
    language: Columns


class HolisticDecoder(nn.Module):
    """Both stacks as one list of layers, counted through, embedding stack first."""

    def __init__(self, config: HolisticVLMConfig):
        super().__init__()
        self.config = config
        self.num_embedding_layers = config.num_embedding_layers
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        vision = config.vision_config
        self.vision = None if vision is None else Vision(vision, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.language.rms_norm_eps)
        self.gradient_checkpointing = False

    @property
    def blocks(self) -> list[Block]:
        """`layers`, as what they are."""
        return cast("list[Block]", list(self.layers))

    def forward(
        self,
        prompt: Prompt,
        cache: Cache | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Normed hidden states (B, T, D) of the prompt's columns.

        `chunk_size` bounds how many columns pass a stack at a time; the result does not depend
        on it.
        """
        if chunk_size is not None and chunk_size < 1:
            raise DataError(
                f"prefill_chunk_size is {chunk_size}, expected at least 1 column",
                "leave it out to pass the whole prompt at once",
            )
        if chunk_size is not None and cache is None:
            cache = new_cache(self.config)
        if chunk_size is not None and prompt.language.seq_idx is not None:
            raise ValueError("packed sequences are not chunked: give one or the other")
        split = self.num_embedding_layers
        hidden = self.embed(prompt)
        if prompt.embedding is not None:
            hidden = self.run(self.layers[:split], hidden, prompt.embedding, cache, chunk_size)
            hidden = self.bridge(hidden, prompt)
        hidden = self.run(self.layers[split:], hidden, prompt.language, cache, chunk_size)
        return self.norm(hidden)

    def prepare(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Prompt:
        """Check the inputs and work out what each stack sees; advances the cache's state.

        With a filled cache, `pixel_values` may be those of the new columns or of the whole
        conversation. Raises `DataError` where inputs do not agree with one another or the cache.
        """
        rows, length = input_ids.shape
        if input_ids.numel() == 0:
            raise DataError(
                f"input_ids is {(rows, length)}, expected at least one row and one column",
                "an empty prompt has no last token to continue; begin with the bos token",
            )
        state = DecodingState() if cache is None else decoding_state(cache)
        if isinstance(cache, HybridCache):
            cache.require_fit(rows, length)
        if seq_idx is not None and state.language.length > 0:
            raise ValueError("packed sequences cannot continue from a cache")
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        vision, seen = self.config.vision_config, state.tiles()
        if vision is not None and pixel_values is not None and seen is not None:
            new = input_ids == vision.image_token_id
            pixel_values = new_tiles(pixel_values, new, vision.tokens_per_tile, seen)
        is_image = self.find_images(input_ids, pixel_values)
        expansion = None
        if is_image is not None and vision is not None:
            if vision.pixel_shuffle == "post":
                expansion = expand(is_image, vision.merge**2)
                if cache is not None and state.static_columns is not None:
                    extra = state.embedding.length - state.language.length + expansion.extra_columns
                    layers = cache.layers[: self.num_embedding_layers]
                    widen_static_layers(layers, state.static_columns + extra)
            if cache is not None:
                state.note_images(is_image, vision.tokens_per_tile, expansion)
        embedding = None
        if self.config.embedding is not None:
            embedding = self._embedding_columns(
                state, input_ids, mask, seq_idx, prompt_lengths, expansion
            )
        language = describe_columns(
            self.config.language,
            state.language,
            length,
            mask=mask,
            seq_idx=seq_idx,
            prompt_lengths=prompt_lengths,
            device=input_ids.device,
            dtype=self.text_embedding.weight.dtype,
        )
        return Prompt(input_ids, pixel_values, is_image, expansion, embedding, language)

    def embed(self, prompt: Prompt) -> Tensor:
        """Text embeddings with the images in their places, (B, E, D)."""
        ids, is_image = prompt.input_ids, prompt.is_image
        if prompt.expansion is not None and is_image is not None:
            ids = prompt.expansion.spread(ids, fill=0)
            is_image = prompt.expansion.spread(is_image, fill=0)
        hidden = self.text_embedding(ids)
        if is_image is None or self.vision is None or prompt.pixel_values is None:
            return hidden
        images = self.vision.embed_patches(prompt.pixel_values)
        if prompt.expansion is None:
            images = self.vision.merge(images)
        return hidden.masked_scatter(is_image.unsqueeze(-1), images.to(hidden.dtype))

    def run(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        hidden: Tensor,
        columns: Columns,
        cache: Cache | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Pass `hidden` through `layers`, `chunk_size` columns at a time if given."""
        length = columns.length
        step = length if chunk_size is None else chunk_size
        outputs = []
        for start in range(0, length, step):
            part = hidden[:, start : start + step]
            seen = columns.chunk(start, min(start + step, length))
            for layer in layers:
                if self.gradient_checkpointing and self.training and cache is None:
                    part = checkpoint(layer, part, seen, use_reentrant=False)
                else:
                    part = layer(part, seen, cache)
            outputs.append(part)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def bridge(self, hidden: Tensor, prompt: Prompt) -> Tensor:
        """From the embedding stack's output (B, E, D) to the language stack's input (B, T, D)."""
        expansion, is_image = prompt.expansion, prompt.is_image
        if expansion is not None and is_image is not None and self.vision is not None:
            rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
            patches = hidden[expansion.spread(is_image, fill=0)]
            per_tile = self.vision.config.patches_per_tile
            images = self.vision.merge(patches.view(-1, per_tile, hidden.shape[-1]))
            merged = hidden[rows, expansion.last]
            hidden = merged.masked_scatter(is_image.unsqueeze(-1), images.to(hidden.dtype))
        if self.config.normalize_embedding_output:
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        return hidden

    def find_images(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor | None:
        """(B, T) bool of image columns, checked against the tiles given; None without images."""
        vision = self.config.vision_config
        if pixel_values is None:
            self._refuse_lost_images(input_ids)
            return None
        if vision is None:
            raise DataError("this model has no vision part", "leave out pixel_values")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != vision.num_channels:
            raise DataError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
                f"(tiles, {vision.num_channels}, {vision.image_size}, {vision.image_size})"
            )
        if pixel_values.shape[0] == 0:
            self._refuse_lost_images(input_ids)
            return None
        is_image = input_ids == vision.image_token_id
        count_tiles(is_image, vision.tokens_per_tile, pixel_values.shape[0])
        return is_image

    def _refuse_lost_images(self, input_ids: Tensor) -> None:
        """A tile's worth of context ids without pixels is a mistake, not text."""
        vision = self.config.vision_config
        if vision is None or input_ids.shape[1] < vision.tokens_per_tile:
            return
        lost = int((input_ids == vision.image_token_id).sum(1).max())
        if lost >= vision.tokens_per_tile:
            raise DataError(
                f"the prompt has {lost} image context tokens in a row of the batch, but no "
                "pixel_values were given",
                "pass the pixel_values that the processor returned",
            )

    def _embedding_columns(
        self,
        state: DecodingState,
        input_ids: Tensor,
        mask: Tensor | None,
        seq_idx: Tensor | None,
        prompt_lengths: Tensor | None,
        expansion: Expansion | None,
    ) -> Columns:
        """What the embedding stack sees: the prompt, with patches for image tokens if "post"."""
        stack = self.config.embedding
        assert stack is not None
        length = input_ids.shape[1]
        if expansion is not None:
            length += expansion.extra_columns
            unpadded = bool((expansion.source >= 0).all())
            if mask is not None or not unpadded:
                before = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
                mask = expansion.spread(before, fill=0)
            if prompt_lengths is not None:
                columns_per_row = (expansion.source >= 0).sum(1)
                prompt_lengths = prompt_lengths + columns_per_row - input_ids.shape[1]
            if seq_idx is not None:
                seq_idx = expansion.spread(seq_idx, fill=-1)
        return describe_columns(
            stack,
            state.embedding,
            length,
            mask=mask,
            seq_idx=seq_idx,
            prompt_lengths=prompt_lengths,
            device=input_ids.device,
            dtype=self.text_embedding.weight.dtype,
        )
