"""Turns of a conversation with slots of pictures and videos, for chat templates of other models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.chat_template import IMAGE_PLACEHOLDER, Message

VIDEO_PLACEHOLDER = "<video>"


class Slot(Enum):
    """The place of a picture or a video; the value is the type of its part of a content."""

    IMAGE = "image"
    VIDEO = "video"


PLACEHOLDERS = {Slot.IMAGE: IMAGE_PLACEHOLDER, Slot.VIDEO: VIDEO_PLACEHOLDER}


@dataclass(frozen=True)
class PromptTurn:
    """A message of one role: texts with slots between them."""

    role: str
    content: tuple[str | Slot, ...]

    def message(self, as_parts: bool) -> dict[str, Any]:
        """The message for a chat template, its content as a list of parts or as a string."""
        if not as_parts:
            return {"role": self.role, "content": "".join(map(str, self.content))}
        parts = [
            {"type": part.value} if isinstance(part, Slot) else {"type": "text", "text": part}
            for part in self.content
        ]
        return {"role": self.role, "content": parts}


def place_slots(
    messages: Sequence[Message], num_images: int, num_videos: int = 0
) -> list[PromptTurn]:
    """Turns with a slot for each picture and video of a sample.

    In a user's plain text `<image>` is a slot, and `<video>` if there are videos. The line breaks
    that LLaVA's format writes between leading or trailing slots and the text are left out: a chat
    template writes its own. What has no place comes before the first question.

    Raises:
        DataError: another number of slots than of pictures or videos.
    """
    counts = {Slot.IMAGE: num_images, Slot.VIDEO: num_videos}
    turns = [_turn(message, split_videos=num_videos > 0) for message in messages]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    for slot, count in reversed(counts.items()):
        placed = sum(turn.content.count(slot) for turn in turns)
        if count and not placed and first is not None:
            turns[first] = PromptTurn("user", (*[slot] * count, *turns[first].content))
        elif placed != count:
            raise DataError(
                f"the prompt has {placed} {PLACEHOLDERS[slot]} but {count} {slot.value}s are given",
                f"write {PLACEHOLDERS[slot]} once for each {slot.value}",
            )
    return turns


def question_turn(text: str, num_images: int) -> PromptTurn:
    """A user's turn; only the first `num_images` `<image>` of `text` are slots, others are text.

    Line breaks beside leading or trailing slots are left out, as in `place_slots`.
    """
    first, *others = text.split(IMAGE_PLACEHOLDER, num_images)
    pieces: list[str | Slot] = [first]
    for other in others:
        pieces += [Slot.IMAGE, other]
    return PromptTurn("user", tuple(_without_breaks(pieces)))


def _turn(message: Message, split_videos: bool) -> PromptTurn:
    role, content = message["role"], message["content"]
    if not isinstance(content, str):
        parts = (Slot(one["type"]) if one["type"] != "text" else one["text"] for one in content)
        return PromptTurn(role, tuple(parts))
    if role != "user":
        return PromptTurn(role, (content,))
    slots = {
        mark: slot for slot, mark in PLACEHOLDERS.items() if slot is Slot.IMAGE or split_videos
    }
    pieces = re.split(f"({'|'.join(map(re.escape, slots))})", content)
    return PromptTurn(role, tuple(_without_breaks([slots.get(piece, piece) for piece in pieces])))


def _without_breaks(content: Sequence[str | Slot]) -> list[str | Slot]:
    parts = list(content)
    if not any(isinstance(part, Slot) for part in parts):
        return parts
    for order, strip in ((1, str.removeprefix), (-1, str.removesuffix)):
        parts = parts[::order]
        seen_slot = False
        for i, part in enumerate(parts):
            if isinstance(part, Slot):
                seen_slot = True
                continue
            parts[i] = stripped = strip(part, "\n") if seen_slot else part
            if stripped:
                break
        parts = parts[::order]
    return [part for part in parts if part != ""]
