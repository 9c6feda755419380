"""Decoder: patches and text, embedding stack, language stack, final norm.

`prepare` checks the inputs and describes what each stack sees; `forward_prepared` runs `embed`,
`run_layers` and `embedding_to_language` in turn. A layer-local training loop calls the same steps.
Legend: B batch, T columns of the prompt, E columns of the embedding stack, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from mmmamba_cli.errors import DataError
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.cache import (
    CACHE_NAME,
    DecodingState,
    HybridCache,
    as_hybrid,
    decoding_state,
    new_cache,
    resolve_cache,
    widen_static_layers,
)
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.image_tokens import (
    check_tile_count,
    expand_image_columns,
    image_token_mask,
    require_vision,
    select_new_tiles,
)
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.patch_embedding import VisionEmbedding
from mmmamba_cli.model.prepared_inputs import (
    PreparedInputs,
    check_inputs,
    check_pixel_values_given,
    check_position_ids,
    check_tile_shape,
    describe_tiles,
    stack_layouts,
    stack_tiles,
)
from mmmamba_cli.model.pretrained import HolisticPreTrainedModel
from mmmamba_cli.model.sequence_layout import SequenceLayout, StackState, packed_sequences

logger = logging.get_logger(__name__)


@dataclass
class LayerOutputs:
    """Hidden states and attention weights collected during a forward pass."""

    # The input of the first layer, then the output of each layer.
    hidden_states: list[Tensor] = field(default_factory=list)
    # (B, H, T, keys) of each attention layer; None if not requested.
    attentions: list[Tensor] | None = None


class HolisticDecoder(HolisticPreTrainedModel):
    """Both stacks as one list of layers, embedding stack first."""

    def __init__(self, config: HolisticVLMConfig):
        super().__init__(config)
        self.num_embedding_layers = config.num_embedding_layers
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        vision = config.vision_config
        self.vision = None if vision is None else VisionEmbedding(vision, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.language.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> list[Block]:
        """`layers`, typed."""
        return cast("list[Block]", list(self.layers))

    # `**kwargs`, as in transformers' own models: `generate`, `Trainer` and peft pass arguments that
    # not every model reads.
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        prefill_chunk_size: int | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Compute the normed hidden states (B, T, D), returned as `last_hidden_state`.

        Arguments are those of `HolisticVLM.forward`. Raises `DataError` if context ids and tiles
        do not match.
        """
        cache = as_hybrid(resolve_cache(past_key_values, cache))
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        if seq_idx is None and attention_mask is None and cache is None:
            seq_idx = packed_sequences(position_ids)
        if cache is None and keep_cache and not self.training and seq_idx is None:
            cache = new_cache(self.config)
        outputs = self._requested_outputs(
            output_hidden_states, output_attentions, prefill_chunk_size
        )
        inputs = self.prepare(
            input_ids,
            pixel_values,
            attention_mask,
            seq_idx,
            prompt_lengths,
            cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )
        hidden = self.forward_prepared(inputs, cache, prefill_chunk_size, outputs)
        returns_states = _or_default(output_hidden_states, self.config.output_hidden_states)
        found = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=tuple(outputs.hidden_states) if outputs and returns_states else None,
            attentions=None if outputs is None else as_tuple(outputs.attentions),
            **{CACHE_NAME: cache if keep_cache else None},
        )
        return found if _or_default(return_dict, self.config.return_dict) else found.to_tuple()

    def _requested_outputs(
        self, hidden_states: bool | None, attentions: bool | None, chunk_size: int | None
    ) -> LayerOutputs | None:
        """The collector for a forward pass; None if nothing is requested."""
        returns_weights = _or_default(attentions, self.config.output_attentions)
        if returns_weights and self.config._attn_implementation != "eager":
            logger.warning_once(
                "output_attentions=True returns no attention weights with attn_implementation="
                f"{self.config._attn_implementation!r}, which does not compute them: load the "
                'model with attn_implementation="eager"'
            )
            returns_weights = False
        if returns_weights and chunk_size is not None:
            raise ValueError("output_attentions and prefill_chunk_size: give one or the other")
        if not returns_weights and not _or_default(hidden_states, self.config.output_hidden_states):
            return None
        return LayerOutputs(attentions=[] if returns_weights else None)

    def forward_prepared(
        self,
        inputs: PreparedInputs,
        cache: Cache | None = None,
        chunk_size: int | None = None,
        outputs: LayerOutputs | None = None,
    ) -> Tensor:
        """Compute the normed hidden states (B, T, D).

        `chunk_size` bounds the columns that pass through a stack at a time; the result does not
        depend on it. `outputs` collects the output of each layer; its last hidden state is normed.
        """
        if chunk_size is not None and chunk_size < 1:
            raise DataError(
                f"prefill_chunk_size is {chunk_size}, expected at least 1 column",
                "leave it out to pass the whole prompt at once",
            )
        if chunk_size is not None and cache is None:
            cache = new_cache(self.config)
        if chunk_size is not None and inputs.language_layout.seq_idx is not None:
            raise ValueError("packed sequences are not chunked: give one or the other")
        if cache is not None and self._checkpoints():
            raise ValueError(
                "gradient checkpointing runs layers twice, which a cache does not allow: train "
                "without past_key_values and prefill_chunk_size"
            )
        split = self.num_embedding_layers
        hidden = self.embed(inputs)
        if outputs is not None:
            outputs.hidden_states.append(hidden)
        if inputs.embedding_layout is not None:
            hidden = self.run_layers(
                self.layers[:split], hidden, inputs.embedding_layout, cache, chunk_size, outputs
            )
            hidden = self.embedding_to_language(hidden, inputs)
        hidden = self.run_layers(
            self.layers[split:], hidden, inputs.language_layout, cache, chunk_size, outputs
        )
        hidden = self.norm(hidden)
        if outputs is not None:
            outputs.hidden_states[-1] = hidden
        return hidden

    def checkpoint_layers(self, active: bool) -> None:
        """Turn activation checkpointing of each layer on or off.

        For other options, use transformers' `gradient_checkpointing_enable`.
        """
        function = partial(checkpoint, use_reentrant=False)
        self._set_gradient_checkpointing(active, function)

    def _checkpoints(self) -> bool:
        """Whether activation checkpointing is active in this forward pass."""
        active = self.training and torch.is_grad_enabled()
        return active and any(layer.gradient_checkpointing for layer in self.blocks)

    def prepare(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        cache: Cache | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        host_ids: Tensor | None = None,
    ) -> PreparedInputs:
        """Check the inputs, describe what each stack sees, and advance the cache's state.

        With a filled cache, `pixel_values` holds the tiles of the new columns or of the whole
        conversation. `host_ids` are `input_ids` on the CPU, if the caller has them: image tokens
        are then counted without waiting for a GPU. Raises `DataError` if inputs contradict each
        other or the cache, and `ValueError` for arguments that exclude each other.
        """
        inputs = check_inputs(input_ids, inputs_embeds, attention_mask)
        rows, length = inputs.shape[:2]
        # torch.compile does not trace the default factories of `DecodingState`.
        state = (
            DecodingState(StackState(), StackState()) if cache is None else decoding_state(cache)
        )
        if isinstance(cache, HybridCache):
            cache.check_capacity(rows, length)
        if seq_idx is not None and state.language.length > 0:
            raise ValueError("packed sequences cannot continue from a cache")
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        vision, seen = self.config.vision_config, state.count_row_tiles()
        if vision is not None and pixel_values is not None and seen is not None:
            new = image_token_mask(vision, input_ids, inputs_embeds, self.text_embedding)
            pixel_values = select_new_tiles(pixel_values, new, vision.tokens_per_tile, seen)
        is_image = self.find_images(input_ids, pixel_values, inputs_embeds, host_ids)
        expansion = None
        if is_image is not None and vision is not None:
            if vision.pixel_shuffle == "post":
                counted = is_image if host_ids is None else host_ids == vision.image_token_id
                expansion = expand_image_columns(is_image, vision.merge**2, counted.sum(1))
                check_position_ids(position_ids, mask, state.language)
            if cache is not None:
                if expansion is not None:
                    widen_static_layers(cache, self.num_embedding_layers, expansion.extra_columns)
                state.record_images(is_image, vision.tokens_per_tile, expansion)
        layouts = stack_layouts(
            self.config,
            state,
            inputs,
            mask=mask,
            seq_idx=seq_idx,
            prompt_lengths=prompt_lengths,
            position_ids=position_ids,
            expansion=expansion,
            dtype=self.text_embedding.weight.dtype,
        )
        found = PreparedInputs(
            input_ids, pixel_values, is_image, expansion, *layouts, inputs_embeds
        )
        return describe_tiles(self.config, found)

    def embed(self, inputs: PreparedInputs) -> Tensor:
        """Embed the text and insert the image tokens or patches, (B, E, D)."""
        ids, is_image = inputs.input_ids, inputs.is_image
        if ids is None:
            assert inputs.inputs_embeds is not None
            hidden = inputs.inputs_embeds.to(self.text_embedding.weight.dtype)
        else:
            if inputs.expansion is not None and is_image is not None:
                ids = inputs.expansion.expand(ids, fill=0)
                is_image = inputs.expansion.expand(is_image, fill=0)
            hidden = self.text_embedding(ids)
        if is_image is None or self.vision is None or inputs.pixel_values is None:
            return hidden
        images = self.vision(inputs.pixel_values)
        if inputs.expansion is None:
            images = self.vision.merge(images)
        return hidden.masked_scatter(is_image.unsqueeze(-1), images.to(hidden.dtype))

    def run_layers(
        self,
        layers: Sequence[nn.Module] | nn.ModuleList,
        hidden: Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        chunk_size: int | None = None,
        outputs: LayerOutputs | None = None,
    ) -> Tensor:
        """Pass `hidden` through `layers`, `chunk_size` columns at a time if given.

        `outputs` collects the output of each layer.
        """
        length = layout.length
        weights = None if outputs is None else outputs.attentions
        parts: list[list[Tensor]] = [[] for _ in layers]
        chunks = [slice(0, length)] if chunk_size is None else layout.split(chunk_size)
        for columns in chunks:
            part = hidden[:, columns]
            chunk_layout = layout.chunk(columns.start, columns.stop)
            for index, layer in enumerate(layers):
                part = layer(part, chunk_layout, cache, weights)
                if outputs is not None or index == len(layers) - 1:
                    parts[index].append(part)
        found = [join(parts_of_layer) for parts_of_layer in parts if parts_of_layer]
        if outputs is not None:
            outputs.hidden_states += found
        return found[-1]

    def embedding_to_language(self, hidden: Tensor, inputs: PreparedInputs) -> Tensor:
        """Turn the embedding stack's output (B, E, D) into the language stack's input (B, T, D)."""
        expansion, is_image = inputs.expansion, inputs.is_image
        if expansion is not None and is_image is not None and self.vision is not None:
            # The embedding stack may be on another device.
            hidden = hidden.to(is_image.device)
            rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
            tiles = stack_tiles(self.config, inputs)[0]
            assert tiles is not None
            images = self.vision.merge(hidden.flatten(0, 1)[tiles.flatten(1)])
            merged = hidden[rows, expansion.last]
            hidden = merged.masked_scatter(is_image.unsqueeze(-1), images.to(hidden.dtype))
        if self.config.normalize_embedding_output:
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        return hidden

    def find_images(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        inputs_embeds: Tensor | None = None,
        host_ids: Tensor | None = None,
    ) -> Tensor | None:
        """(B, T) bool, True at image tokens, checked against the number of tiles; None for text.

        Image tokens are found as by `image_token_mask`, and counted in `host_ids` if given.
        """
        vision = self.config.vision_config
        if pixel_values is not None:
            check_tile_shape(require_vision(vision), pixel_values)
        if vision is None or pixel_values is None or pixel_values.shape[0] == 0:
            if input_ids is not None:
                check_pixel_values_given(vision, input_ids if host_ids is None else host_ids)
            return None
        is_image = image_token_mask(vision, input_ids, inputs_embeds, self.text_embedding)
        counted = is_image if host_ids is None else host_ids == vision.image_token_id
        check_tile_count(counted, vision.tokens_per_tile, pixel_values.shape[0])
        return is_image


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def as_tuple(values: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if values is None else tuple(values)


def _or_default(given: bool | None, default: bool | None) -> bool:
    return bool(default if given is None else given)
