"""Keyword arguments of the processors, in transformers' groups and names.

No `from __future__ import annotations` here: transformers reads the annotations as types.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from mmmamba_cli.errors import DataError


class HolisticVLMImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """`min_tiles` and `max_tiles` override the processor's; `return_num_tiles` also returns the
    number of tiles of each image.
    """

    min_tiles: int | None
    max_tiles: int | None
    return_num_tiles: bool | None


class HolisticVLMProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """By default, prompts are padded and returned as tensors."""

    images_kwargs: HolisticVLMImagesKwargs
    _defaults = {  # noqa: RUF012 (transformers reads a plain dict)
        "text_kwargs": {"padding": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class HolisticTextProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Keywords of the processor of a text-only model."""

    _defaults = {  # noqa: RUF012
        "text_kwargs": {"padding": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


TILING_KWARGS = frozenset(HolisticVLMImagesKwargs.__annotations__) - frozenset(
    ImagesKwargs.__annotations__
)
# Keywords of transformers' other processors, which would be ignored silently.
_OTHER_INPUTS = ("videos", "audio", "audios", "videos_kwargs", "audio_kwargs")
_UNSUPPORTED_TEXT = (
    "text_pair",
    "text_target",
    "text_pair_target",
    "is_split_into_words",
    "stride",
    "return_overflowing_tokens",
    "return_offsets_mapping",
    "return_text_replacement_offsets",
    "return_token_type_ids",
    "sanitize_control_tokens",
)


def merge_kwargs(
    processor: ProcessorMixin, kwargs: Mapping[str, Any], inputs: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (text_kwargs, images_kwargs) of a call, including defaults.

    `inputs` names the inputs of the processor in messages.

    Raises:
        TypeError: a keyword that transformers does not define.
        ValueError: a keyword passed twice, or a value of a wrong type.
        DataError: a feature that this processor does not support.
    """
    kwargs = dict(kwargs)
    for name in _OTHER_INPUTS:
        if kwargs.pop(name, None):
            raise DataError(f"the processor reads {inputs}, not {name}", f"leave out {name}")
    known = processor.valid_processor_kwargs
    groups = {name: set(group.__annotations__) for name, group in _groups(known).items()}
    for name, value in kwargs.items():
        if name not in known.__annotations__ and not any(
            name in group for group in groups.values()
        ):
            raise TypeError(f"unexpected keyword argument {name!r}")
        for key in value if name in groups and isinstance(value, Mapping) else ():
            if key not in groups[name]:
                raise TypeError(f"unexpected keyword argument {key!r} in {name}")
    merged = processor._merge_kwargs(
        known, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **kwargs
    )
    text, images = dict(merged["text_kwargs"]), dict(merged["images_kwargs"])
    # A text keyword in older versions of transformers, a processor keyword in newer ones.
    text["return_mm_token_type_ids"] = merged.get("return_mm_token_type_ids", False) or text.get(
        "return_mm_token_type_ids"
    )
    for name in _UNSUPPORTED_TEXT:
        if text.get(name):
            raise DataError(f"the processor does not support {name}", f"leave out {name}")
    for name, value in images.items():
        if name not in TILING_KWARGS and name != "return_tensors" and value is not None:
            allowed = ", ".join(sorted(TILING_KWARGS))
            raise DataError(
                f"{name} cannot be set for a call: pictures are cut and normalised as the model "
                "was trained",
                f"keywords for images are {allowed}",
            )
    return text, images


def _groups(known: type) -> dict[str, type]:
    names = ("text_kwargs", "images_kwargs")
    return {name: known.__annotations__[name] for name in names}


def truncate(
    tokenizer: Any, row: list[int], text_kwargs: Mapping[str, Any], room: int, whole: Iterable[int]
) -> list[int]:
    """Truncate `row` to `max_length` minus `room` tokens if `truncation` is set.

    Tokens are removed at the tokenizer's `truncation_side`. `whole` are ids that must be kept,
    those of images.

    Raises:
        DataError: truncation would remove one of `whole`.
    """
    limit = _limit(tokenizer, text_kwargs)
    if limit is None or len(row) + room <= limit:
        return row
    keep = max(0, limit - room)
    cut = len(row) - keep
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    kept, lost = (row[cut:], row[:cut]) if left else (row[:keep], row[keep:])
    if not set(whole).isdisjoint(lost):
        raise DataError(
            f"the prompt has {len(row) + room} tokens, and cut to max_length = {limit} it would "
            "lose part of an image",
            "give a larger max_length, or fewer tiles with max_tiles",
        )
    return kept


def _limit(tokenizer: Any, text_kwargs: Mapping[str, Any]) -> int | None:
    """Maximum row length in tokens; None without truncation."""
    truncation = text_kwargs.get("truncation")
    truncation = getattr(truncation, "value", truncation)
    if not truncation or truncation == "do_not_truncate":
        return None
    limit = text_kwargs.get("max_length")
    limit = tokenizer.model_max_length if limit is None else limit
    # 10^30 is transformers' value for a tokenizer without a maximum.
    return int(limit) if limit < 2**31 else None


def pad_rows(
    tokenizer: Any,
    rows: list[list[int]],
    text_kwargs: Mapping[str, Any],
    image_token_id: int | None,
) -> dict[str, Any]:
    """Pad rows of ids to a batch: `input_ids`, and the outputs selected by `text_kwargs`."""
    batch: dict[str, Any] = {"input_ids": rows}
    padding = text_kwargs.get("padding")
    padding = getattr(padding, "value", padding)
    if text_kwargs.get("return_special_tokens_mask"):
        batch["special_tokens_mask"] = [
            tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in rows
        ]
    wants_mask = text_kwargs.get("return_attention_mask")
    padded = tokenizer.pad(
        batch,
        padding=False if padding is None else padding,
        max_length=text_kwargs.get("max_length") if padding == "max_length" else None,
        pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
        padding_side=text_kwargs.get("padding_side"),
        return_attention_mask=True if wants_mask is None else wants_mask,
        return_tensors=text_kwargs.get("return_tensors"),
    )
    found = dict(padded)
    if text_kwargs.get("return_length"):
        found["length"] = [len(row) for row in rows]
    if text_kwargs.get("return_mm_token_type_ids"):
        found["mm_token_type_ids"] = _token_types(found["input_ids"], image_token_id)
    return found


def _token_types(ids: Any, image_token_id: int | None) -> Any:
    """1 at image tokens, else 0; of the same type as `ids`."""
    if isinstance(ids, list):
        return [[int(index == image_token_id) for index in row] for row in ids]
    return (ids == (-1 if image_token_id is None else image_token_id)) * 1
