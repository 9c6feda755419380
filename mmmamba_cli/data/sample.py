"""Parsing of one sample: a conversation with pictures, or plain text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.data.file_version import FileVersion
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import ImageSource
from mmmamba_cli.processing.chat_template import IMAGE_PLACEHOLDER

# Roles of LLaVA's conversations and of chat messages, by the role of the chat template.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Frames in a second of a video that is given as pictures, unless its sample says otherwise: the
# rate at which Qwen's processors sample.
DEFAULT_FPS = 2.0
# Of a high-speed camera.
MAX_FPS = 1_000_000
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Keys of a sample that hold its turns or text, and those of its pictures and videos.
TURN_KEYS = ("conversations", "messages", "texts", "text")
MEDIA_KEYS = ("image", "images", "video", "videos", "fps")
# Keys of an image part that may hold the path.
IMAGE_PATH_KEYS = ("image", "path", "url", "image_url")

Content = str | list[dict[str, str]]


def first_present(record: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that is present and not null; None if there is none."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def describe_type(value: Any) -> str:
    """The type of a JSON value, as part of a sentence."""
    return "null" if value is None else f"a {type(value).__name__}"


def parse_turns(
    turns: Sequence[Any], listed: Sequence[str], name: str
) -> tuple[tuple[dict[str, Any], ...], list[str], list[Any]]:
    """Parse turns into messages of role and content, picture names in prompt order, and videos.

    An image part may name its own picture. Other image parts, and each `<image>` in plain texts of
    the user, take the next of the names `listed` beside the turns; unused names come last. Videos
    are those that parts name.

    Raises:
        DataError: a turn is malformed; the message names the sample and the turn.
    """
    rest = iter(listed)
    messages, images, videos = [], [], []
    for position, turn in enumerate(turns):
        where = f"{name}: turn {position + 1}"
        role, content, named = _parse_turn(turn, where)
        if isinstance(content, list):
            shown = first_present(turn, "value", "content")
            videos += [part["video"] for part in shown if part.get("video") is not None]
        messages.append({"role": role, "content": content})
        if isinstance(content, str):
            named = [None] * (content.count(IMAGE_PLACEHOLDER) if role == "user" else 0)
        images += [next(rest, None) if image is None else image for image in named]
    return tuple(messages), [image for image in images if image is not None] + list(rest), videos


def _parse_turn(turn: Any, where: str) -> tuple[str, Content, list[str | None]]:
    """Role, content, and for each image part the picture it names, or None."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {describe_type(turn)}, expected a JSON object")
    role, content = first_present(turn, "from", "role"), first_present(turn, "value", "content")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} is from {role!r:.60}, allowed are {', '.join(ROLES)}")
    if isinstance(content, str):
        return ROLES[role], content, []
    if not isinstance(content, list):
        raise DataError(f"{where} says {content!r:.60}, expected text or a list of parts")
    parts = list(_parse_parts(content, ROLES[role], where))
    return (
        ROLES[role],
        [part for part, _ in parts],
        [image for part, image in parts if part["type"] == "image"],
    )


def _parse_parts(
    parts: Sequence[Any], role: str, where: str
) -> Iterator[tuple[dict[str, str], str | None]]:
    """Yield each part in the processor's format, and the picture it names."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}, None
        elif kind in ("image", "image_url") and role == "user":
            yield {"type": "image"}, _image_path(part, where)
        elif kind == "video" and role == "user":
            yield {"type": "video"}, None
        elif kind in ("image", "image_url", "video"):
            raise DataError(f"{where} has an image or a video, and only the user shows any")
        else:
            raise DataError(
                f"{where} has {part!r:.60} among its parts, expected "
                '{"type": "text", "text": ...}, {"type": "image"} or {"type": "video"}'
            )


def _image_path(part: Mapping[str, Any], where: str) -> str | None:
    """The path in an image part; None if the part names no picture."""
    image = first_present(part, *IMAGE_PATH_KEYS)
    if isinstance(image, Mapping):
        # OpenAI's format: {"image_url": {"url": ...}}.
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
    """A picture inside another file, read on access."""

    file: FileVersion
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the bytes. Raises `DataError` if the file cannot be read or has another size."""
        try:
            with self.file.path.open("rb") as handle:
                self.file.check_size(handle.fileno())
                handle.seek(self.offset)
                return handle.read(self.size)
        except OSError as error:
            raise DataError(f"{self.file.path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True, eq=False)
class ImageBytes:
    """A picture that has been read with its sample: the bytes of an image file."""

    content: bytes

    def read(self) -> bytes:
        return self.content


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture of a generated corpus, of `width` x `height` pixels, that is drawn later.

    `layout` is for the corpus' own `stack`; it can be pickled.
    """

    width: int
    height: int
    layout: Any


ImageLocation = Path | FileSlice | ImageBytes
# A picture of a sample: in a file, or drawn on the device of training.
Picture = ImageLocation | Drawing
ImageFinder = Callable[[str], ImageLocation]


@dataclass(frozen=True)
class Video:
    """A video of a sample: picture files of its frames, or a `clip` to be decoded.

    `fps` is the number of frames in a second of those that are given as pictures.
    """

    frames: tuple[ImageLocation, ...] = ()
    clip: Path | None = None
    fps: float = DEFAULT_FPS


@dataclass(frozen=True)
class Sample:
    """A conversation (`messages` of role and content) or a plain `text`, with pictures in order.

    A content is a string, in which `<image>` of the user stands for a picture, and `<video>` for a
    video if the sample has any, or a list of `{"type": "text", "text": ...}`, `{"type": "image"}`
    and `{"type": "video"}`, in which `<image>` is plain text.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    images: tuple[Picture, ...] = ()
    videos: tuple[Video, ...] = ()


def parse_sample(record: Any, name: str, find_image: ImageFinder) -> Sample:
    """Parse the JSON formats of LLaVA and InternVL, chat messages, and plain text.

    `{"image": path or list, "conversations": [{"from": "human", "value": ...}, ...]}`, the same
    with `"messages": [{"role": ..., "content": ...}]` or, turns in pairs, with `"texts": [{"user":
    ..., "assistant": ...}]`, or `{"text": ...}`. A content may be a list of parts, as in chat APIs;
    an image part without a path takes the next picture of the sample. Null values count as absent.

    Raises:
        DataError: the record is malformed; the message names the sample.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{name}: is {describe_type(record)}, expected a JSON object")
    turns, text = first_present(record, "conversations", "messages"), record.get("text")
    if turns is None:
        turns = _paired_turns(record.get("texts"), name)
    # Beside turns, `text` is ignored: some datasets store captions there.
    if turns is None and text is not None:
        if not isinstance(text, str) or not text:
            raise DataError(f"{name}: text is {text!r:.60}, expected text")
        if first_present(record, "image", "images", "video", "videos"):
            raise DataError(
                f"{name}: has an image or a video and no turns, expected a list of conversations"
            )
        return Sample(name, text=text)
    if turns is not None and not isinstance(turns, list):
        raise DataError(f"{name}: the turns are {describe_type(turns)}, expected a list")
    if not turns:
        raise DataError(
            f"{name}: has no turns, expected a list called conversations, messages or texts, "
            "or a text"
        )
    listed = _listed_images(record, name)
    messages, images, shown = parse_turns(turns, listed, name)
    _check_order(messages, name)
    found = _find_images(images, name, find_image)
    videos = parse_videos([*shown, *listed_videos(record)], record.get("fps"), name, find_image)
    return Sample(name, messages, images=found, videos=videos)


def _paired_turns(pairs: Any, name: str) -> list[dict[str, Any]] | None:
    """Turns of `[{"user": ..., "assistant": ...}]`; None for no list of objects.

    Raises:
        DataError: a pair is incomplete; the message names the sample.
    """
    if not isinstance(pairs, list) or not pairs or not all(isinstance(p, Mapping) for p in pairs):
        return None
    turns = []
    for number, pair in enumerate(pairs, start=1):
        for role in ("user", "assistant"):
            if first_present(pair, role) is None:
                raise DataError(f"{name}: pair {number} of texts has no {role}")
            turns.append({"role": role, "content": pair[role]})
    return turns


def read_image(picture: ImageLocation) -> ImageSource:
    """The path or bytes of a picture. Raises `DataError` if its file cannot be read."""
    return picture if isinstance(picture, Path) else picture.read()


def resolve_image(root: Path, name: str) -> Path:
    """The path of image `name`, which must be inside `root`.

    Symbolic links in `root` are followed anywhere: the owner of the folder made them, not the data.

    Raises:
        DataError: the name leads out of `root` by `..` or as an absolute path, or does not exist.
    """
    # `Path.resolve` would follow links: `link/../a.png` would be relative to the link's target.
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
    # `Path.resolve` raises its own error for circular links.
    return Path(os.path.realpath(path))


def _check_order(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    """After an optional system turn, user and assistant alternate, and the assistant is last."""
    roles = [message["role"] for message in messages]
    body = roles[1:] if roles[0] == "system" else roles
    for position, role in enumerate(body):
        expected = "user" if position % 2 == 0 else "assistant"
        if role != expected:
            turn = position + 1 + len(roles) - len(body)
            raise DataError(f"{name}: turn {turn} is the {role}'s, expected the {expected}'s")
    if not body or body[-1] != "assistant":
        raise DataError(f"{name}: the conversation ends without an answer")


def listed_videos(record: Mapping[str, Any]) -> list[Any]:
    """The videos that a sample lists beside its turns: each a path, or the paths of its frames."""
    listed = first_present(record, "videos", "video")
    if listed is None or listed == "":
        return []
    if not isinstance(listed, list) or ("videos" not in record and _are_frames(listed)):
        return [listed]
    return listed


def _are_frames(paths: Sequence[Any]) -> bool:
    return bool(paths) and all(
        isinstance(path, str) and path.lower().endswith(PICTURE_SUFFIXES) for path in paths
    )


def parse_videos(
    values: Sequence[Any], fps: Any, name: str, find: ImageFinder
) -> tuple[Video, ...]:
    """The videos of a sample. Raises `DataError` for other values than paths, or no such file."""
    is_rate = not isinstance(fps, bool) and isinstance(fps, int | float) and 0 < fps <= MAX_FPS
    if fps is not None and not is_rate:
        raise DataError(
            f"{name}: fps is {fps!r:.60}, expected a number above 0 and at most {MAX_FPS:,}"
        )
    videos = []
    for value in values:
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise DataError(
                f"{name}: a video is {value!r:.60}, expected a path or a list of paths of frames"
            )
        found = _find_images(paths, name, find)
        if isinstance(value, list):
            videos.append(Video(found, fps=float(fps or DEFAULT_FPS)))
        elif isinstance(found[0], Path):
            videos.append(Video(clip=found[0]))
        else:
            raise DataError(
                f"{name}: the video {value} lies in a shard; give its frames as pictures"
            )
    return tuple(videos)


def _listed_images(record: Mapping[str, Any], name: str) -> list[str]:
    """Names of the pictures that the sample lists beside its turns."""
    named = first_present(record, "image", "images")
    # InternVL writes an empty path in samples without an image.
    if named is None or named == "":
        return []
    listed = named if isinstance(named, list) else [named]
    for image in listed:
        if not isinstance(image, str) or not image:
            raise DataError(f"{name}: image is {image!r:.60}, expected a path")
    return listed


def _find_images(names: Sequence[str], name: str, find: ImageFinder) -> tuple[ImageLocation, ...]:
    found = []
    for image in names:
        try:
            found.append(find(image))
        except (DataError, OSError, ValueError) as error:
            text = error.message if isinstance(error, DataError) else str(error)
            raise DataError(f"{name}: {text}") from error
    return tuple(found)
