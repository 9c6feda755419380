"""Prompts of transformers' own models, by the chat template of their processor or tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.images import ImageSource, open_image


def encode_conversation(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    pictures: Sequence[ImageSource] = (),
    *,
    has_vision: bool,
) -> dict[str, Any]:
    """The inputs of a model for one conversation, up to the start of the answer; one row.

    Args:
        processor: a family's processor, or a tokenizer if `has_vision` is false.
        messages: role and content; content is text or a list of parts, of which
            `{"type": "image"}` takes the next picture.

    Raises:
        DataError: no chat template, a picture that cannot be read, or pictures without vision.
    """
    if getattr(processor, "chat_template", None) is None:
        raise DataError(
            "the processor has no chat template, so a conversation has no format",
            "put the chat_template.jinja of the teacher beside it",
        )
    if pictures and not has_vision:
        raise DataError("there are pictures, and the model reads text only")
    rest = iter(pictures)
    found = [
        {"role": one["role"], "content": _content(one["content"], rest, has_vision)}
        for one in messages
    ]
    batch = processor.apply_chat_template(
        found, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(batch)


def place_inputs(
    inputs: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The inputs of a model on its device, floating-point tensors in its dtype."""
    return {name: _placed(value, device, dtype) for name, value in inputs.items()}


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _content(content: Any, pictures: Iterator[ImageSource], has_vision: bool) -> Any:
    """Parts with opened pictures; plain text where the templates of language models expect it."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not has_vision:
        return "".join(part["text"] for part in parts)
    return [
        {**part, "image": open_image(next(pictures))} if part["type"] == "image" else part
        for part in parts
    ]
