"""The whole decoder: patches and text, embedding stack, language stack, final norm.

`prepare` looks at the inputs once and says what each stack will see; `embed`, `run` and `bridge`
are the steps between, so that a layer-local training loop can walk the same path as `forward`.
`run_prompt` is all of them.
Legend: B batch, T columns of the prompt, E columns the embedding stack sees, D hidden size.
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
    one_cache,
    widen_static_layers,
)
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.image_tokens import Expansion, count_tiles, expand, new_tiles
from mmmamba_cli.model.norm import RMSNorm
from mmmamba_cli.model.patch_embedding import Vision
from mmmamba_cli.model.pretrained import HolisticPreTrainedModel
from mmmamba_cli.model.prompt import (
    Prompt,
    check_tile_shape,
    checked_inputs,
    embedding_columns,
    refuse_lost_images,
    refuse_positions,
)
from mmmamba_cli.model.sequence_layout import (
    Columns,
    StackState,
    describe_columns,
    packed_sequences,
)

logger = logging.get_logger(__name__)


@dataclass
class LayerOutputs:
    """What a forward collects on its way, where it is asked to."""

    # The input of the first layer, then the output of each.
    hidden_states: list[Tensor] = field(default_factory=list)
    # (B, H, T, keys) of each attention layer; None where they are not wanted.
    attentions: list[Tensor] | None = None


class HolisticDecoder(HolisticPreTrainedModel):
    """Both stacks as one list of layers, counted through, embedding stack first."""

    def __init__(self, config: HolisticVLMConfig):
        super().__init__(config)
        self.num_embedding_layers = config.num_embedding_layers
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        vision = config.vision_config
        self.vision = None if vision is None else Vision(vision, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.language.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> list[Block]:
        """`layers`, as what they are."""
        return cast("list[Block]", list(self.layers))

    # `**kwargs` takes what transformers' own models take: `generate`, `Trainer` and peft pass
    # arguments that not every model reads.
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
        """Normed hidden states (B, T, D), `last_hidden_state`; arguments as `HolisticVLM.forward`.

        Raises `DataError` when context ids and tiles do not agree.
        """
        cache = as_hybrid(one_cache(past_key_values, cache))
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        if seq_idx is None and attention_mask is None and cache is None:
            seq_idx = packed_sequences(position_ids)
        if cache is None and keep_cache and not self.training and seq_idx is None:
            cache = new_cache(self.config)
        outputs = self._asked_outputs(output_hidden_states, output_attentions, prefill_chunk_size)
        prompt = self.prepare(
            input_ids,
            pixel_values,
            attention_mask,
            seq_idx,
            prompt_lengths,
            cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )
        hidden = self.run_prompt(prompt, cache, prefill_chunk_size, outputs)
        wants_states = _asked(output_hidden_states, self.config.output_hidden_states)
        found = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=tuple(outputs.hidden_states) if outputs and wants_states else None,
            attentions=None if outputs is None else as_tuple(outputs.attentions),
            **{CACHE_NAME: cache if keep_cache else None},
        )
        return found if _asked(return_dict, self.config.return_dict) else found.to_tuple()

    def _asked_outputs(
        self, hidden_states: bool | None, attentions: bool | None, chunk_size: int | None
    ) -> LayerOutputs | None:
        """What a forward has to collect; None for nothing."""
        wants_weights = _asked(attentions, self.config.output_attentions)
        if wants_weights and self.config._attn_implementation != "eager":
            logger.warning_once(
                "output_attentions=True returns no attention weights with attn_implementation="
                f"{self.config._attn_implementation!r}, which does not compute them: load the "
                'model with attn_implementation="eager"'
            )
            wants_weights = False
        if wants_weights and chunk_size is not None:
            raise ValueError("output_attentions and prefill_chunk_size: give one or the other")
        if not wants_weights and not _asked(hidden_states, self.config.output_hidden_states):
            return None
        return LayerOutputs(attentions=[] if wants_weights else None)

    def run_prompt(
        self,
        prompt: Prompt,
        cache: Cache | None = None,
        chunk_size: int | None = None,
        outputs: LayerOutputs | None = None,
    ) -> Tensor:
        """Normed hidden states (B, T, D) of the prompt's columns.

        `chunk_size` bounds how many columns pass a stack at a time; the result does not depend
        on it. `outputs` collects what each layer gives; its last hidden state is the normed one.
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
        if cache is not None and self._checkpoints():
            raise ValueError(
                "gradient checkpointing runs layers twice, which a cache does not allow: train "
                "without past_key_values and prefill_chunk_size"
            )
        split = self.num_embedding_layers
        hidden = self.embed(prompt)
        if outputs is not None:
            outputs.hidden_states.append(hidden)
        if prompt.embedding is not None:
            hidden = self.run(
                self.layers[:split], hidden, prompt.embedding, cache, chunk_size, outputs
            )
            hidden = self.bridge(hidden, prompt)
        hidden = self.run(self.layers[split:], hidden, prompt.language, cache, chunk_size, outputs)
        hidden = self.norm(hidden)
        if outputs is not None:
            outputs.hidden_states[-1] = hidden
        return hidden

    def checkpoint_layers(self, active: bool) -> None:
        """Turn activation checkpointing of each layer on or off.

        `gradient_checkpointing_enable`, transformers' own, takes the function and its options.
        """
        function = partial(checkpoint, use_reentrant=False)
        self._set_gradient_checkpointing(active, function)

    def _checkpoints(self) -> bool:
        """Whether layers are computed a second time for their gradients."""
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
    ) -> Prompt:
        """Check the inputs and work out what each stack sees; advances the cache's state.

        With a filled cache, `pixel_values` may be those of the new columns or of the whole
        conversation. Raises `DataError` where inputs do not agree with one another or the cache,
        `ValueError` for arguments that do not go together.
        """
        inputs = checked_inputs(input_ids, inputs_embeds, attention_mask)
        rows, length = inputs.shape[:2]
        state = (
            DecodingState(StackState(), StackState()) if cache is None else decoding_state(cache)
        )
        if isinstance(cache, HybridCache):
            cache.require_fit(rows, length)
        if seq_idx is not None and state.language.length > 0:
            raise ValueError("packed sequences cannot continue from a cache")
        mask = None if attention_mask is None else attention_mask[:, -length:].bool()
        vision, seen = self.config.vision_config, state.tiles()
        if vision is not None and pixel_values is not None and seen is not None:
            new = self.context_columns(input_ids, inputs_embeds)
            pixel_values = new_tiles(pixel_values, new, vision.tokens_per_tile, seen)
        is_image = self.find_images(input_ids, pixel_values, inputs_embeds)
        expansion = None
        if is_image is not None and vision is not None:
            if vision.pixel_shuffle == "post":
                expansion = expand(is_image, vision.merge**2)
                refuse_positions(position_ids, mask, state.language)
                self._widen(cache, state, expansion)
            if cache is not None:
                state.note_images(is_image, vision.tokens_per_tile, expansion)
        embedding = None
        if self.config.embedding is not None:
            embedding = embedding_columns(
                self.config.embedding,
                state.embedding,
                inputs,
                mask=mask,
                seq_idx=seq_idx,
                prompt_lengths=prompt_lengths,
                position_ids=position_ids,
                expansion=expansion,
                dtype=self.text_embedding.weight.dtype,
            )
        language = describe_columns(
            self.config.language,
            state.language,
            length,
            mask=mask,
            seq_idx=seq_idx,
            prompt_lengths=prompt_lengths,
            position_ids=position_ids,
            device=inputs.device,
            dtype=self.text_embedding.weight.dtype,
        )
        return Prompt(
            input_ids, pixel_values, is_image, expansion, embedding, language, inputs_embeds
        )

    def _widen(self, cache: Cache | None, state: DecodingState, expansion: Expansion) -> None:
        """Give the embedding stack of a static cache room for every patch."""
        if cache is not None and state.static_columns is not None:
            extra = state.embedding.length - state.language.length + expansion.extra_columns
            layers = cache.layers[: self.num_embedding_layers]
            widen_static_layers(layers, state.static_columns + extra)

    def embed(self, prompt: Prompt) -> Tensor:
        """Text embeddings with the images in their places, (B, E, D)."""
        ids, is_image = prompt.input_ids, prompt.is_image
        if ids is None:
            assert prompt.inputs_embeds is not None
            hidden = prompt.inputs_embeds.to(self.text_embedding.weight.dtype)
        else:
            if prompt.expansion is not None and is_image is not None:
                ids = prompt.expansion.spread(ids, fill=0)
                is_image = prompt.expansion.spread(is_image, fill=0)
            hidden = self.text_embedding(ids)
        if is_image is None or self.vision is None or prompt.pixel_values is None:
            return hidden
        images = self.vision(prompt.pixel_values)
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
        outputs: LayerOutputs | None = None,
    ) -> Tensor:
        """Pass `hidden` through `layers`, `chunk_size` columns at a time if given.

        `outputs` collects what each layer gives.
        """
        length = columns.length
        step = length if chunk_size is None else chunk_size
        weights = None if outputs is None else outputs.attentions
        parts: list[list[Tensor]] = [[] for _ in layers]
        for start in range(0, length, step):
            part = hidden[:, start : start + step]
            seen = columns.chunk(start, min(start + step, length))
            for index, layer in enumerate(layers):
                part = layer(part, seen, cache, weights)
                if outputs is not None or index == len(layers) - 1:
                    parts[index].append(part)
        found = [join(parts_of_layer) for parts_of_layer in parts if parts_of_layer]
        if outputs is not None:
            outputs.hidden_states += found
        return found[-1]

    def bridge(self, hidden: Tensor, prompt: Prompt) -> Tensor:
        """From the embedding stack's output (B, E, D) to the language stack's input (B, T, D)."""
        expansion, is_image = prompt.expansion, prompt.is_image
        if expansion is not None and is_image is not None and self.vision is not None:
            # The layers before may be on another device.
            hidden = hidden.to(is_image.device)
            rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
            patches = hidden[expansion.spread(is_image, fill=0)]
            per_tile = self.vision.config.patches_per_tile
            images = self.vision.merge(patches.view(-1, per_tile, hidden.shape[-1]))
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
    ) -> Tensor | None:
        """(B, T) bool of image columns, checked against the tiles given; None without images.

        Among `inputs_embeds` they are the columns that hold the embedding of the context id.
        """
        vision = self.config.vision_config
        if pixel_values is None:
            if input_ids is not None:
                refuse_lost_images(vision, input_ids)
            return None
        if vision is None:
            raise DataError("this model has no vision part", "leave out pixel_values")
        check_tile_shape(vision, pixel_values)
        if pixel_values.shape[0] == 0:
            if input_ids is not None:
                refuse_lost_images(vision, input_ids)
            return None
        is_image = self.context_columns(input_ids, inputs_embeds)
        count_tiles(is_image, vision.tokens_per_tile, pixel_values.shape[0])
        return is_image

    def context_columns(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, T) bool of the columns that stand for image tokens.

        Among `inputs_embeds` they are those that hold the embedding of the context id. Raises
        `DataError` for a model that cannot tell them.
        """
        vision = self.config.vision_config
        if vision is None:
            raise DataError("this model has no vision part", "leave out pixel_values")
        if input_ids is not None:
            return input_ids == vision.image_token_id
        assert inputs_embeds is not None
        if vision.pixel_shuffle == "post":
            raise DataError(
                "inputs_embeds cannot hold pictures where the pixel shuffle comes after the "
                "embedding stack, which sees every patch of them",
                "pass input_ids with the pixel_values",
            )
        context = torch.tensor([vision.image_token_id], device=inputs_embeds.device)
        return (inputs_embeds == self.text_embedding(context)).all(-1)


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def as_tuple(values: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if values is None else tuple(values)


def _asked(given: bool | None, default: bool | None) -> bool:
    return bool(default if given is None else given)
