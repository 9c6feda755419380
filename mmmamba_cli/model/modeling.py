"""The model with its language-modeling head, as a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmmamba_cli.model.cache import CACHE_NAME, HybridCache, as_hybrid
from mmmamba_cli.model.config import ATTENTION, HolisticVLMConfig
from mmmamba_cli.model.decoder import HolisticDecoder
from mmmamba_cli.model.image_tokens import (
    check_tile_count,
    image_token_mask,
    require_vision,
    tiles_per_row,
)
from mmmamba_cli.model.pretrained import HolisticPreTrainedModel

__all__ = ["HolisticDecoder", "HolisticVLM"]

IGNORED_LABEL = -100


class HolisticVLM(HolisticPreTrainedModel, GenerationMixin):
    """Teacher, hybrid or linear student, depending on `config.layer_types`.

    The name avoids "mamba": `generate` passes another cache argument to classes of such names.
    """

    _tied_weights_keys = {"lm_head.weight": "model.text_embedding.weight"}  # noqa: RUF012
    # `Trainer` then passes `num_items_in_batch`, the divisor of the loss.
    accepts_loss_kwargs = True

    def __init__(self, config: HolisticVLMConfig):
        super().__init__(config)
        self.model = HolisticDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @property
    def _is_stateful(self) -> bool:
        """Whether the cache cannot be rolled back for assisted decoding: with linear layers."""
        return any(kind != ATTENTION for kind in self.config.layer_types)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    # `**kwargs`, as in transformers' own models: `generate`, `Trainer` and peft pass arguments that
    # not every model reads.
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        prefill_chunk_size: int | None = None,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Compute next-token logits (B, T, V), and the loss if `labels` are given.

        Args:
            input_ids: (B, T) ids; an image is `tokens_per_tile` context ids per tile.
            pixel_values: (tiles of the whole batch, 3, S, S), in the order of their context ids.
            attention_mask: (B, T) or (B, past + T), 1 at real tokens; left or right padding.
            past_key_values, cache: the cache; two names of one argument.
            labels: (B, T) ids, -100 at positions that are not scored. The loss is divided by
                `num_items_in_batch` if `kwargs` has it, else by the number of scored labels; it is
                0 without scored labels.
            seq_idx: (B, T) ids of packed sequences; states and positions restart at each.
            prompt_lengths: (B,) whole prompt lengths, which fix dynamic-NTK RoPE; needed only if
                the caller passes a prompt in parts.
            prefill_chunk_size: columns that pass through a stack at a time, to bound memory.
            logits_to_keep: number of last columns, or an index tensor; 0 for all.
            inputs_embeds: (B, T, D), replaces `input_ids` as the input of the first layer.
            position_ids: (B or 1, T) for RoPE, replaces a count of the real tokens. Without mask
                and cache, positions that restart mark packed sequences.
            output_hidden_states: return the input of the first layer and the output of each layer,
                the last one normed. With the pixel shuffle "post", those of the embedding stack
                have one column per patch.
            output_attentions: return (B, H, T, keys) of each attention layer; needs
                attn_implementation="eager".

        Raises:
            DataError: context ids and tiles do not match, or an argument cannot be used with
                images.
            ValueError: arguments exclude each other.
        """
        outputs = self.model(
            input_ids,
            pixel_values,
            attention_mask,
            past_key_values,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            seq_idx=seq_idx,
            prompt_lengths=prompt_lengths,
            prefill_chunk_size=prefill_chunk_size,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cache=cache,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self._loss(logits, labels, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        """Cross-entropy of next-token prediction of `labels` (B, T), by transformers' function.

        The divisor is passed explicitly and is at least 1: a mean over no label would be NaN.
        """
        count = kwargs.pop("num_items_in_batch", None)
        if count is None:
            targets = kwargs.get("shift_labels")
            targets = labels[:, 1:] if targets is None else targets
            count = (targets != IGNORED_LABEL).sum()
        count = count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
        loss: Tensor = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=count,
            **kwargs,
        )
        return loss

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Extend transformers' method; with a cache, pass images in the first call of a turn only.

        `generate` inspects this signature for `inputs_embeds`.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **_with_cache_name(kwargs),
        )
        cache = inputs.get(CACHE_NAME)
        continues = cache is not None and cache.get_seq_length() > 0 and not is_first_iteration
        # transformers also drops the images of the first call in assisted decoding.
        inputs["pixel_values"] = None if continues else kwargs.get("pixel_values")
        # Each stack counts its positions from the mask.
        inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = _with_cache_name(model_kwargs)
        model_kwargs.clear()
        model_kwargs.update(given)
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None:
            model_kwargs[CACHE_NAME] = as_hybrid(cache)
        return result

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Pass the prompt lengths for RoPE, and leave chunking to the model.

        Chunks of ids would cut images, which the embedding stack may need whole.
        """
        if model_kwargs.get("prompt_lengths") is None:
            mask = model_kwargs.get("attention_mask")
            embeds = model_kwargs.get("inputs_embeds")
            inputs = input_ids if embeds is None else embeds
            full = torch.full((inputs.shape[0],), inputs.shape[1], device=inputs.device)
            model_kwargs["prompt_lengths"] = full if mask is None else mask.sum(1)
        if generation_config.prefill_chunk_size is not None:
            model_kwargs["prefill_chunk_size"] = generation_config.prefill_chunk_size
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat rows, and those of a filled cache, for beam search.

        The tiles of a row are repeated together, not one by one.
        """
        pixels = model_kwargs.pop("pixel_values", None)
        embeds = model_kwargs.get("inputs_embeds")
        inputs = input_ids if embeds is None else embeds
        if expand_size > 1 and inputs is not None:
            cache = as_hybrid(_with_cache_name(model_kwargs).get(CACHE_NAME))
            if pixels is not None:
                is_image = image_token_mask(
                    self.config.vision_config,
                    input_ids if embeds is None else None,
                    embeds,
                    self.model.text_embedding,
                )
                tiles = self._tiles_of_rows(is_image, len(pixels), cache)
                pixels = torch.cat(
                    [row.repeat(expand_size, 1, 1, 1) for row in pixels.split(tiles)]
                )
            if cache is not None and cache.rows == len(inputs):
                cache.batch_repeat_interleave(expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if pixels is not None:
            model_kwargs["pixel_values"] = pixels
        return input_ids, model_kwargs

    def _tiles_of_rows(
        self, is_image: Tensor, num_tiles: int, cache: HybridCache | None
    ) -> list[int]:
        """Number of tiles in each row; `DataError` if `num_tiles` does not match."""
        per_tile = require_vision(self.config.vision_config).tokens_per_tile
        seen = None if cache is None else cache.decoding_state.count_row_tiles()
        if cache is None or seen is None:
            check_tile_count(is_image, per_tile, num_tiles)
            return (is_image.sum(1) // per_tile).tolist()
        counts, length = is_image.sum(1) // per_tile, cache.get_seq_length()
        # The ids are those of the whole conversation or those after the cache.
        before = is_image[:, :length].sum(1) // per_tile
        is_whole = is_image.shape[1] > length and torch.equal(
            before, seen.to(before.device).expand_as(before)
        )
        if is_whole and num_tiles != int(seen.sum() + counts.sum()):
            counts = is_image[:, length:].sum(1) // per_tile
        return tiles_per_row(counts, seen, num_tiles).tolist()


def _with_cache_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Pass a cache under the name that this release of transformers uses."""
    other = "past_key_values" if CACHE_NAME == "cache" else "cache"
    if arguments.get(other) is None:
        return {name: value for name, value in arguments.items() if name != other}
    if arguments.get(CACHE_NAME) is not None:
        raise ValueError("past_key_values and cache are two names of one argument: give one")
    return {CACHE_NAME if name == other else name: value for name, value in arguments.items()}
