"""The turns of a conversation as files write them: roles, texts, and which picture stands where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.template import IMAGE_PLACEHOLDER

# Who speaks, in LLaVA's words and in those of chat messages.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Where an image part names its picture.
NAMES = ("image", "path", "url", "image_url")

Content = str | list[dict[str, str]]


def given(record: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that the record has and that is not null."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def kind_of(value: Any) -> str:
    """What a value is, for a sentence."""
    return "null" if value is None else f"a {type(value).__name__}"


def parse_turns(
    turns: Sequence[Any], listed: Sequence[str], name: str
) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """Messages of role and content, and the pictures' names in the order of their places.

    An image part may name its own picture; other parts, and each `<image>` of the user's plain
    texts, take the next of those `listed` beside the turns. What is left of these comes last.
    Raises `DataError` that names the sample and the turn.
    """
    rest = iter(listed)
    messages, images = [], []
    for position, turn in enumerate(turns):
        where = f"{name}: turn {position + 1}"
        role, content, own = _turn(turn, where)
        messages.append({"role": role, "content": content})
        places = own
        if isinstance(content, str):
            places = [None] * (content.count(IMAGE_PLACEHOLDER) if role == "user" else 0)
        images += [next(rest, None) if place is None else place for place in places]
    return tuple(messages), [image for image in images if image is not None] + list(rest)


def _turn(turn: Any, where: str) -> tuple[str, Content, list[str | None]]:
    """Role, content, and the picture that each image part names."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {kind_of(turn)}, expected a JSON object")
    speaker, said = given(turn, "from", "role"), given(turn, "value", "content")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise DataError(f"{where} is from {speaker!r:.60}, allowed are {', '.join(SPEAKERS)}")
    if isinstance(said, str):
        return SPEAKERS[speaker], said, []
    if not isinstance(said, list):
        raise DataError(f"{where} says {said!r:.60}, expected text or a list of parts")
    parts = list(_parts(said, SPEAKERS[speaker], where))
    return (
        SPEAKERS[speaker],
        [part for part, _ in parts],
        [image for part, image in parts if part["type"] == "image"],
    )


def _parts(
    said: Sequence[Any], role: str, where: str
) -> Iterator[tuple[dict[str, str], str | None]]:
    """Each part as the processor takes it, and the picture it names."""
    for part in said:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}, None
        elif kind in ("image", "image_url") and role == "user":
            yield {"type": "image"}, _named(part, where)
        elif kind in ("image", "image_url"):
            raise DataError(f"{where} has an image, and only the user shows any")
        else:
            raise DataError(
                f"{where} has {part!r:.60} among its parts, expected "
                '{"type": "text", "text": ...} or {"type": "image"}'
            )


def _named(part: Mapping[str, Any], where: str) -> str | None:
    """The picture of an image part; None if the part names none."""
    image = given(part, *NAMES)
    if isinstance(image, Mapping):
        # As in OpenAI's messages: {"image_url": {"url": ...}}.
        image = given(image, "url", "path")
    if image is None and not set(part) - {"type"}:
        return None
    if not isinstance(image, str) or not image:
        raise DataError(f"{where} has an image that is {image!r:.60}, expected a path")
    if image.startswith(("http://", "https://", "data:")):
        raise DataError(
            f"{where} has the image {image:.40}, which is not a file; download it first"
        )
    return image
