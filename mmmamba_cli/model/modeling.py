"""The one model class, as transformers knows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmmamba_cli.architecture import FP32_PARAMETERS
from mmmamba_cli.errors import DataError
from mmmamba_cli.model.cache import HybridCache, as_hybrid, new_cache
from mmmamba_cli.model.config import ATTENTION, HolisticVLMConfig
from mmmamba_cli.model.decoder import HolisticDecoder
from mmmamba_cli.model.layout import count_tiles, tiles_of_rows


class HolisticVLM(PreTrainedModel, GenerationMixin):
    """Teacher, hybrid or linear student: `config.layer_types` tells which.

    The name avoids "mamba", which `generate` takes as a sign of another cache argument.
    """

    config_class = HolisticVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = FP32_PARAMETERS
    # Tensors of a teacher that no forward uses; they are kept on disk for exports.
    _keys_to_ignore_on_load_unexpected = (r"^unused\.",)
    _tied_weights_keys = {"lm_head.weight": "model.text_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: HolisticVLMConfig):
        super().__init__(config)
        self.model = HolisticDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def _is_stateful(self) -> bool:
        """Whether decoding cannot be taken back, as assisted decoding does: not with attention."""
        return any(kind != ATTENTION for kind in self.config.layer_types)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.text_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
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
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Next-token logits (B, T, V).

        input_ids: (B, T) ids; each image stands as `tokens_per_tile` context ids a tile.
        pixel_values: (tiles of the whole batch, 3, S, S), in the order of their context ids.
        attention_mask: (B, T), or (B, past + T), 1 for real tokens; padding left or right.
        seq_idx: (B, T) ids that tell packed sequences apart; mixers and positions start anew.
        prompt_lengths: (B,) whole prompt lengths, which fix dynamic-NTK RoPE; needed only where a
            prompt is fed in parts by the caller.
        prefill_chunk_size: columns that pass a stack at a time, to bound memory.
        logits_to_keep: the last so many columns, or an index tensor; 0 for all.

        Raises `DataError` when context ids and tiles do not agree.
        """
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        cache = as_hybrid(past_key_values)
        if cache is None and keep_cache and not self.training and seq_idx is None:
            cache = new_cache(self.config)
        prompt = self.model.prepare(
            input_ids, pixel_values, attention_mask, seq_idx, prompt_lengths, cache
        )
        hidden = self.model(prompt, cache, prefill_chunk_size)
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None if labels is None else next_token_loss(logits, labels)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if keep_cache else None
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers does it; with a cache, images belong to the first call of each turn."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        cache = inputs.get("past_key_values")
        goes_on = cache is not None and cache.get_seq_length() > 0 and not is_first_iteration
        # transformers leaves images out of an assistant's first call as well.
        inputs["pixel_values"] = None if goes_on else kwargs.get("pixel_values")
        # Positions follow from the mask, for each stack on its own.
        inputs.pop("position_ids", None)
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            model_kwargs["past_key_values"] = as_hybrid(cache)
        return result

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Fix the prompt's length for RoPE, and chunk inside the model.

        Cutting the ids before the model sees them would cut images, which the embedding stack may
        have to see whole.
        """
        if model_kwargs.get("prompt_lengths") is None:
            mask = model_kwargs.get("attention_mask")
            full = torch.full((input_ids.shape[0],), input_ids.shape[1], device=input_ids.device)
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
        """Repeat rows for beams, with a filled cache's.

        The tiles of a row are repeated together, not one by one.
        """
        pixels = model_kwargs.pop("pixel_values", None)
        if expand_size > 1 and input_ids is not None:
            cache = as_hybrid(model_kwargs.get("past_key_values"))
            if pixels is not None:
                tiles = self._tiles_of_rows(input_ids, len(pixels), cache)
                pixels = torch.cat(
                    [row.repeat(expand_size, 1, 1, 1) for row in pixels.split(tiles)]
                )
            if cache is not None and cache.rows == len(input_ids):
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
        self, input_ids: Tensor, num_tiles: int, cache: HybridCache | None
    ) -> list[int]:
        """How many of the tiles belong to each row; `DataError` if their number does not fit."""
        vision = self.config.vision_config
        if vision is None:
            raise DataError("this model has no vision part", "leave out pixel_values")
        is_image, per_tile = input_ids == vision.image_token_id, vision.tokens_per_tile
        seen = None if cache is None else cache.decoding_state.tiles()
        if cache is None or seen is None:
            count_tiles(is_image, per_tile, num_tiles)
            return (is_image.sum(1) // per_tile).tolist()
        counts, length = is_image.sum(1) // per_tile, cache.get_seq_length()
        # The ids are those of the whole conversation, or those that follow the cache.
        before = is_image[:, :length].sum(1) // per_tile
        is_whole = input_ids.shape[1] > length and torch.equal(before, seen.expand_as(before))
        if is_whole and num_tiles != int(seen.sum() + counts.sum()):
            counts = is_image[:, length:].sum(1) // per_tile
        return tiles_of_rows(counts, seen, num_tiles).tolist()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of predicting labels (B, T) one column ahead; -100 is not scored."""
    shifted = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
