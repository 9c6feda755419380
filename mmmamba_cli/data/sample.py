"""One sample: a conversation with pictures, or plain text.

The turns of a conversation as files write them: roles, texts, and which picture stands where.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import ImageSource
from mmmamba_cli.processing.chat_template import IMAGE_PLACEHOLDER

# Who speaks, in LLaVA's words and in those of chat messages.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Where an image part names its picture.
IMAGE_PATH_KEYS = ("image", "path", "url", "image_url")

Content = str | list[dict[str, str]]


def first_present(record: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that the record has and that is not null."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def describe_type(value: Any) -> str:
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
        raise DataError(f"{where} is {describe_type(turn)}, expected a JSON object")
    speaker, said = first_present(turn, "from", "role"), first_present(turn, "value", "content")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"{where} is from {speaker!r:.60}, allowed are {', '.join(ROLES)}")
    if isinstance(said, str):
        return ROLES[speaker], said, []
    if not isinstance(said, list):
        raise DataError(f"{where} says {said!r:.60}, expected text or a list of parts")
    parts = list(_parts(said, ROLES[speaker], where))
    return (
        ROLES[speaker],
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
    image = first_present(part, *IMAGE_PATH_KEYS)
    if isinstance(image, Mapping):
        # As in OpenAI's messages: {"image_url": {"url": ...}}.
        image = first_present(image, "url", "path")
    if image is None and not set(part) - {"type"}:
        return None
    if not isinstance(image, str) or not image:
        raise DataError(f"{where} has an image that is {image!r:.60}, expected a path")
    if image.startswith(("http://", "https://", "data:")):
        raise DataError(
            f"{where} has the image {image:.40}, which is not a file; download it first"
        )
    return image


@dataclass(frozen=True)
class FileSlice:
    """A picture within a file, read only when it is needed."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises `DataError` if the file cannot be read any more."""
        try:
            with self.file.open("rb") as handle:
                handle.seek(self.offset)
                return handle.read(self.size)
        except OSError as error:
            raise DataError(f"{self.file} cannot be read: {error.strerror}") from error


ImageLocation = Path | FileSlice
ImageFinder = Callable[[str], ImageLocation]


@dataclass(frozen=True)
class Sample:
    """`messages` of role and content, or `text` where it is no conversation; pictures in order.

    A content is a text, in which `<image>` stands for a picture if the user says it, or a list of
    `{"type": "text", "text": ...}` and `{"type": "image"}`, in whose texts it does not.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    images: tuple[ImageLocation, ...] = ()


def parse_sample(record: Any, name: str, find_image: ImageFinder) -> Sample:
    """A sample from JSON as LLaVA and InternVL write it, as chat messages, or as plain text.

    `{"image": path or list, "conversations": [{"from": "human", "value": ...}, ...]}`, the same
    with `"messages": [{"role": ..., "content": ...}]`, or `{"text": ...}`. A content may be a list
    of parts, as in chat APIs; an image part that names no picture takes the next of the sample's. A
    key that is null is taken as absent. Raises `DataError` that names the sample.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{name}: is {describe_type(record)}, expected a JSON object")
    if first_present(record, "video", "videos"):
        raise DataError(f"{name}: has a video, and only images are read")
    turns, text = first_present(record, "conversations", "messages"), record.get("text")
    # Beside turns, a text is a remark on the sample: some sets have captions there.
    if turns is None and text is not None:
        if not isinstance(text, str) or not text:
            raise DataError(f"{name}: text is {text!r:.60}, expected text")
        if first_present(record, "image", "images"):
            raise DataError(f"{name}: has an image and no turns, expected a list of conversations")
        return Sample(name, text=text)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{name}: has no turns, expected a list called conversations or messages, or a text"
        )
    listed = _listed_images(record, name)
    messages, images = parse_turns(turns, listed, name)
    _check_order(messages, name)
    return Sample(name, messages, images=_find_all(images, name, find_image))


def read_image(picture: ImageLocation) -> ImageSource:
    """What a picture is opened from. Raises `DataError` if its file cannot be read any more."""
    return picture.read() if isinstance(picture, FileSlice) else picture


def resolve_image(root: Path, name: str) -> Path:
    """The path of image `name`, which must lie in `root`.

    Links in `root` are followed wherever they lead: they were put there by its owner, not by the
    data. Raises `DataError` for a name that leads out of it by `..` or as a whole path, or that is
    not there.
    """
    # Not `resolve`, which follows links: of `link/../a.png` it would take what the link leads to.
    base = Path(os.path.normpath(Path.cwd() / root))
    path = Path(os.path.normpath(base / name))
    is_inside = path.is_relative_to(base) or (
        Path(name).is_absolute() and _resolved(path).is_relative_to(_resolved(base))
    )
    if not is_inside:
        raise DataError(
            f"image {name} lies outside the image root {base}",
            "choose another --image-root (data.image_root)",
        )
    if not path.is_file():
        raise DataError(f"image {path} does not exist")
    return path


def _resolved(path: Path) -> Path:
    # Not `Path.resolve`, which raises an error of its own for links that lead in a circle.
    return Path(os.path.realpath(path))


def _check_order(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    """After an optional system turn, user and assistant take turns, and the assistant ends."""
    roles = [message["role"] for message in messages]
    body = roles[1:] if roles[0] == "system" else roles
    for position, role in enumerate(body):
        expected = "user" if position % 2 == 0 else "assistant"
        if role != expected:
            turn = position + 1 + len(roles) - len(body)
            raise DataError(f"{name}: turn {turn} is the {role}'s, expected the {expected}'s")
    if not body or body[-1] != "assistant":
        raise DataError(f"{name}: the conversation ends without an answer")


def _listed_images(record: Mapping[str, Any], name: str) -> list[str]:
    """The pictures that the sample names beside its turns."""
    named = first_present(record, "image", "images")
    # InternVL's sets have an empty path in samples without an image.
    if named is None or named == "":
        return []
    listed = named if isinstance(named, list) else [named]
    for image in listed:
        if not isinstance(image, str) or not image:
            raise DataError(f"{name}: image is {image!r:.60}, expected a path")
    return listed


def _find_all(names: Sequence[str], name: str, find: ImageFinder) -> tuple[ImageLocation, ...]:
    found = []
    for image in names:
        try:
            found.append(find(image))
        except (DataError, OSError, ValueError) as error:
            text = error.message if isinstance(error, DataError) else str(error)
            raise DataError(f"{name}: {text}") from error
    return tuple(found)
