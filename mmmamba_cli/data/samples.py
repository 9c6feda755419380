"""One sample: a conversation with pictures, or plain text."""

from __future__ import annotations

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
FindImage = Callable[[str], ImageSource]


@dataclass(frozen=True)
class Sample:
    """`messages` of role and content, or `text` where it is no conversation; pictures in order."""

    name: str
    messages: tuple[Mapping[str, str], ...] = ()
    text: str | None = None
    images: tuple[ImageSource, ...] = ()


def parse_sample(record: Any, name: str, find_image: FindImage) -> Sample:
    """A sample from JSON as LLaVA and InternVL write it, as chat messages, or as plain text.

    `{"image": path or list, "conversations": [{"from": "human", "value": ...}, ...]}`, the same
    with `"messages": [{"role": ..., "content": ...}]`, or `{"text": ...}`. Raises `DataError` that
    names the sample.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{name}: is a {type(record).__name__}, expected a JSON object")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"]:
            raise DataError(f"{name}: text is {record['text']!r:.60}, expected text")
        return Sample(name, text=record["text"])
    turns = record.get("conversations", record.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{name}: has no turns, expected a list called conversations or messages, or a text"
        )
    messages = tuple(_message(turn, position, name) for position, turn in enumerate(turns))
    _check_order(messages, name)
    return Sample(name, messages, images=_images(record, name, find_image))


def inside(root: Path | None, name: str) -> Path:
    """The path of image `name`, which must lie in `root` (or below the working directory).

    Raises `DataError` for one that leads out of it, through `..` or a link, or that is not there.
    """
    base = (root or Path()).resolve()
    path = (base / name).resolve()
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


def _message(turn: Any, position: int, name: str) -> dict[str, str]:
    where = f"{name}: turn {position + 1}"
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is a {type(turn).__name__}, expected a JSON object")
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker not in SPEAKERS:
        raise DataError(f"{where} is from {speaker!r}, allowed are {', '.join(SPEAKERS)}")
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


def _images(record: Mapping[str, Any], name: str, find: FindImage) -> tuple[ImageSource, ...]:
    given = record.get("image", record.get("images"))
    if given is None:
        return ()
    listed = given if isinstance(given, list) else [given]
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
