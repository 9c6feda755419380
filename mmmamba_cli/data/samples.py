"""One sample: a conversation with pictures, or plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import ImageSource

# Who speaks, in LLaVA's words and in those of chat messages.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


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
    """`messages` of role and content, or `text` where it is no conversation; pictures in order."""

    name: str
    messages: tuple[Mapping[str, str], ...] = ()
    text: str | None = None
    images: tuple[Picture, ...] = ()


def parse_sample(record: Any, name: str, find_image: FindImage) -> Sample:
    """A sample from JSON as LLaVA and InternVL write it, as chat messages, or as plain text.

    `{"image": path or list, "conversations": [{"from": "human", "value": ...}, ...]}`, the same
    with `"messages": [{"role": ..., "content": ...}]`, or `{"text": ...}`. A key that is null is
    taken as absent. Raises `DataError` that names the sample.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{name}: is {_kind(record)}, expected a JSON object")
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
    messages = tuple(_message(turn, position, name) for position, turn in enumerate(turns))
    _check_order(messages, name)
    return Sample(name, messages, images=_images(record, name, find_image))


def load_picture(picture: Picture) -> ImageSource:
    """What a picture is opened from. Raises `DataError` if its file cannot be read any more."""
    return picture.read() if isinstance(picture, Stored) else picture


def inside(root: Path, name: str) -> Path:
    """The path of image `name`, which must lie in `root`.

    Raises `DataError` for one that leads out of it, through `..` or a link, or that is not there.
    """
    base = root.resolve()
    # Not `resolve`, which raises an error of its own for links that lead in a circle.
    path = Path(os.path.realpath(base / name))
    if not path.is_relative_to(base):
        raise DataError(
            f"image {name} lies outside the image root {base}",
            "choose another --image-root (data.image_root)",
        )
    if not path.is_file():
        raise DataError(f"image {path} does not exist")
    return path


def member_key(name: str) -> tuple[str, str]:
    """(key, extension) of a webdataset member: `a/b.seg.png` -> ("a/b", "seg.png")."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, extension.lower()


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _message(turn: Any, position: int, name: str) -> dict[str, str]:
    where = f"{name}: turn {position + 1}"
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {_kind(turn)}, expected a JSON object")
    speaker, said = given(turn, "from", "role"), given(turn, "value", "content")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise DataError(f"{where} is from {speaker!r:.60}, allowed are {', '.join(SPEAKERS)}")
    if not isinstance(said, str):
        raise DataError(f"{where} says {said!r:.60}, expected text")
    return {"role": SPEAKERS[speaker], "content": said}


def _check_order(messages: Sequence[Mapping[str, str]], name: str) -> None:
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


def given(record: Mapping[str, Any], *keys: str) -> Any:
    """The first of these that the record has and that is not null."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _images(record: Mapping[str, Any], name: str, find: FindImage) -> tuple[Picture, ...]:
    named = given(record, "image", "images")
    # InternVL's sets have an empty path in samples without an image.
    if named is None or named == "":
        return ()
    listed = named if isinstance(named, list) else [named]
    found = []
    for image in listed:
        if not isinstance(image, str) or not image:
            raise DataError(f"{name}: image is {image!r:.60}, expected a path")
        try:
            found.append(find(image))
        except (DataError, OSError, ValueError) as error:
            text = error.message if isinstance(error, DataError) else str(error)
            raise DataError(f"{name}: {text}") from error
    return tuple(found)
