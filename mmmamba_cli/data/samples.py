"""One sample: a conversation with pictures, or plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.data.turns import given, kind_of, parse_turns
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import ImageSource


@dataclass(frozen=True)
class Stored:
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


Picture = Path | Stored
FindImage = Callable[[str], Picture]


@dataclass(frozen=True)
class Sample:
    """`messages` of role and content, or `text` where it is no conversation; pictures in order.

    A content is a text, in which `<image>` stands for a picture if the user says it, or a list of
    `{"type": "text", "text": ...}` and `{"type": "image"}`, in whose texts it does not.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    images: tuple[Picture, ...] = ()


def parse_sample(record: Any, name: str, find_image: FindImage) -> Sample:
    """A sample from JSON as LLaVA and InternVL write it, as chat messages, or as plain text.

    `{"image": path or list, "conversations": [{"from": "human", "value": ...}, ...]}`, the same
    with `"messages": [{"role": ..., "content": ...}]`, or `{"text": ...}`. A content may be a list
    of parts, as in chat APIs; an image part that names no picture takes the next of the sample's. A
    key that is null is taken as absent. Raises `DataError` that names the sample.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{name}: is {kind_of(record)}, expected a JSON object")
    if given(record, "video", "videos"):
        raise DataError(f"{name}: has a video, and only images are read")
    turns, text = given(record, "conversations", "messages"), record.get("text")
    # Beside turns, a text is a remark on the sample: some sets have captions there.
    if turns is None and text is not None:
        if not isinstance(text, str) or not text:
            raise DataError(f"{name}: text is {text!r:.60}, expected text")
        if given(record, "image", "images"):
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


def load_picture(picture: Picture) -> ImageSource:
    """What a picture is opened from. Raises `DataError` if its file cannot be read any more."""
    return picture.read() if isinstance(picture, Stored) else picture


def inside(root: Path, name: str) -> Path:
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
    named = given(record, "image", "images")
    # InternVL's sets have an empty path in samples without an image.
    if named is None or named == "":
        return []
    listed = named if isinstance(named, list) else [named]
    for image in listed:
        if not isinstance(image, str) or not image:
            raise DataError(f"{name}: image is {image!r:.60}, expected a path")
    return listed


def _find_all(names: Sequence[str], name: str, find: FindImage) -> tuple[Picture, ...]:
    found = []
    for image in names:
        try:
            found.append(find(image))
        except (DataError, OSError, ValueError) as error:
            text = error.message if isinstance(error, DataError) else str(error)
            raise DataError(f"{name}: {text}") from error
    return tuple(found)
