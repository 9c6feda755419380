"""Which pictures belong to which text, for the ways in which callers nest them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.images import ImageSource
from mmmamba_cli.processing.template import IMAGE_PLACEHOLDER, ImageSlot, Message, Part

Conversation = str | Sequence[Message]
Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource] | None]


def is_list(value: object) -> bool:
    """Whether it is a list of things, and not a thing: a batch of pictures as one array is."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 4
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_list(images: Any) -> list[ImageSource]:
    """None, one picture or a list of them, as a list."""
    if images is None:
        return []
    return list(images) if is_list(images) else [images]


def deal_images(images: Any, wanted: list[int]) -> list[list[ImageSource]]:
    """A list of pictures for each text, of which text i has `wanted[i]` places."""
    listed = as_list(images)
    if any(is_list(one) for one in listed):
        if len(listed) != len(wanted):
            raise DataError(f"there are {len(wanted)} texts and {len(listed)} lists of images")
        return [as_list(one) for one in listed]
    if sum(wanted) != len(listed):
        raise DataError(
            f"the text has {sum(wanted)} {IMAGE_PLACEHOLDER} but {len(listed)} images are given",
            f"write {IMAGE_PLACEHOLDER} once for each image",
        )
    rest = iter(listed)
    return [[next(rest) for _ in range(count)] for count in wanted]


def deal_conversations(
    conversation: Any, images: Any
) -> tuple[list[Conversation], list[list[ImageSource]]]:
    """Conversations and the pictures of each, from one of them or several."""
    if not isinstance(conversation, str) and not conversation:
        raise DataError("there is no conversation", "pass a question or at least one message")
    if isinstance(conversation, str) or isinstance(conversation[0], Mapping):
        pictures = as_list(images)
        # `[[picture]]` for a single conversation, as transformers nests them.
        nested = len(pictures) == 1 and is_list(pictures[0])
        return [conversation], [as_list(pictures[0]) if nested else pictures]
    if images is None:
        return list(conversation), [[] for _ in conversation]
    if not is_list(images) or len(images) != len(conversation):
        raise DataError(
            f"there are {len(conversation)} conversations, but images is not a list of as many "
            "lists of images"
        )
    return list(conversation), [as_list(one) for one in images]


def fill_slots(parts: Sequence[Part], given: Sequence[ImageSource]) -> list[ImageSource]:
    """The pictures of a prompt in the order of its slots, `given` ones where a slot has none.

    What is given beyond the slots stays at the end, for `check_images` to find.
    """
    rest = iter(given)
    slots = [part for part in parts if isinstance(part, ImageSlot)]
    found = [next(rest, None) if slot.source is None else slot.source for slot in slots]
    return [one for one in found if one is not None] + list(rest)
