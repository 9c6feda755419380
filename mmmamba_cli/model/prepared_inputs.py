"""Checked model inputs with the layout of each stack.

Legend: B batch, T columns of the prompt, E columns of the embedding stack, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mmmamba_cli.architecture import ALL_LAYERS
from mmmamba_cli.errors import DataError
from mmmamba_cli.model.cache import DecodingState
from mmmamba_cli.model.config import HolisticVisionConfig, HolisticVLMConfig
from mmmamba_cli.model.image_tokens import Expansion
from mmmamba_cli.model.sequence_layout import SequenceLayout, StackState, next_layout
from mmmamba_cli.model.tiles import tile_columns


@dataclass(frozen=True)
class PreparedInputs:
    """Inputs of both stacks, made by `HolisticDecoder.prepare`."""

    input_ids: Tensor | None
    pixel_values: Tensor | None
    # (B, T) bool, True at image tokens; None without images.
    is_image: Tensor | None
    # Set if the embedding stack sees more columns than the language stack.
    expansion: Expansion | None
    # None for a plain language model.
    embedding_layout: SequenceLayout | None
    language_layout: SequenceLayout
    # (B, T, D), replaces the text embeddings of `input_ids`.
    inputs_embeds: Tensor | None = None


def check_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """Return the one of `input_ids` (B, T) and `inputs_embeds` (B, T, D) that is not None.

    Raises:
        ValueError: both or neither were passed, or the mask is not (B, columns).
        DataError: an empty prompt.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give one of input_ids and inputs_embeds")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected (batch, columns)"
        )
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    assert inputs is not None
    check_not_empty(inputs, "input_ids" if inputs_embeds is None else "inputs_embeds")
    return inputs


def check_not_empty(inputs: Tensor, name: str = "input_ids") -> None:
    """Raise `DataError` for an empty prompt (B, T) or (B, T, D)."""
    if inputs.numel() == 0:
        raise DataError(
            f"{name} is {tuple(inputs.shape)}, expected at least one row and one column",
            "an empty prompt has no last token to continue; begin with the bos token",
        )


def check_tile_shape(vision: HolisticVisionConfig, pixel_values: Tensor) -> None:
    """Raise `DataError` unless `pixel_values` is (tiles, channels, height, width)."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != vision.num_channels:
        raise DataError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, expected "
            f"(tiles, {vision.num_channels}, {vision.image_size}, {vision.image_size})"
        )


def check_pixel_values_given(vision: HolisticVisionConfig | None, input_ids: Tensor) -> None:
    """Raise `DataError` for context ids of at least one tile without `pixel_values`.

    Skipped in a compiled graph, which cannot branch on values.
    """
    if vision is None or input_ids.shape[1] < vision.tokens_per_tile:
        return
    if torch.compiler.is_compiling():
        return
    lost = int((input_ids == vision.image_token_id).sum(1).max())
    if lost >= vision.tokens_per_tile:
        raise DataError(
            f"the prompt has {lost} image context tokens in a row of the batch, but no "
            "pixel_values were given",
            "pass the pixel_values that the processor returned",
        )


def check_position_ids(position_ids: Tensor | None, mask: Tensor | None, state: StackState) -> None:
    """Raise `DataError` for positions that differ from a count of the real tokens.

    With the pixel shuffle "post", position_ids do not determine the positions of patches. Counted
    positions, as data collators write them, are the default anyway.
    """
    if position_ids is None:
        return
    begin = state.length if state.next_position is None else state.next_position
    counted = torch.arange(position_ids.shape[1], device=position_ids.device)
    if mask is not None:
        counted = mask.long().cumsum(1) - 1
    counted = counted + begin
    same = counted == position_ids
    if not bool((same if mask is None else same | ~mask).all()):
        raise DataError(
            "position_ids other than the number of each token cannot be used with pictures "
            "where the pixel shuffle comes after the embedding stack, which counts patches",
            "leave out position_ids",
        )


def stack_layouts(
    config: HolisticVLMConfig,
    state: DecodingState,
    inputs: Tensor,
    *,
    mask: Tensor | None,
    seq_idx: Tensor | None,
    prompt_lengths: Tensor | None,
    position_ids: Tensor | None,
    expansion: Expansion | None,
    dtype: torch.dtype,
) -> tuple[SequenceLayout | None, SequenceLayout]:
    """Layouts of the embedding stack (None without one) and of the language stack.

    `inputs` is (B, T) or (B, T, D); the other arguments are those of `next_layout`. Advances both
    states of `state`. With an `expansion`, the embedding stack sees patches.
    """
    rows, length = inputs.shape[:2]
    describe = partial(next_layout, device=inputs.device, dtype=dtype)
    unexpanded = partial(
        describe,
        num_columns=length,
        mask=mask,
        seq_idx=seq_idx,
        prompt_lengths=prompt_lengths,
        position_ids=position_ids,
    )
    embedding = None
    if config.embedding is not None and expansion is None:
        embedding = unexpanded(config.embedding, state.embedding)
    elif config.embedding is not None and expansion is not None:
        patch_mask = None
        if mask is not None or expansion.is_padded:
            real = torch.ones(rows, length, dtype=torch.bool, device=inputs.device)
            patch_mask = expansion.expand(real if mask is None else mask, fill=0)
        if prompt_lengths is not None:
            prompt_lengths = prompt_lengths + (expansion.source >= 0).sum(1) - length
        embedding = describe(
            config.embedding,
            state.embedding,
            length + expansion.extra_columns,
            mask=patch_mask,
            seq_idx=None if seq_idx is None else expansion.expand(seq_idx, fill=-1),
            prompt_lengths=prompt_lengths,
        )
    return embedding, unexpanded(config.language, state.language)


def describe_tiles(config: HolisticVLMConfig, inputs: PreparedInputs) -> PreparedInputs:
    """Add the tiles to the layouts of the stacks in which a layer of `config` reads them.

    `prepare` does so for its own config. A student with `mixer.tile_taps` that runs on inputs that
    its teacher prepared needs it as well.
    """
    options = config.mixer_config
    if not options.tile_taps:
        return inputs
    in_embedding, in_language = stack_tiles(config, inputs)
    embedding, language = inputs.embedding_layout, inputs.language_layout
    if in_language is None:
        return inputs
    if embedding is not None:
        embedding = replace(embedding, tiles=in_embedding)
    if options.tile_layers == ALL_LAYERS:
        language = replace(language, tiles=in_language)
    return replace(inputs, embedding_layout=embedding, language_layout=language)


def stack_tiles(
    config: HolisticVLMConfig, inputs: PreparedInputs
) -> tuple[Tensor | None, Tensor | None]:
    """The tiles among the columns of the embedding and of the language stack; None without any.

    Each is (N, g, g) int64 as `tile_columns` gives them. With the pixel shuffle "post" those of the
    embedding stack hold patches.
    """
    vision, is_image, expansion = config.vision_config, inputs.is_image, inputs.expansion
    if vision is None or is_image is None or inputs.pixel_values is None:
        return None, None
    tiles = len(inputs.pixel_values)
    tokens = tile_columns(is_image, tiles, vision.grid // vision.merge)
    if inputs.embedding_layout is None:
        return None, tokens
    if expansion is None:
        return tokens, tokens
    is_patch = expansion.expand(is_image, fill=0)
    return tile_columns(is_patch, tiles, vision.grid), tokens
