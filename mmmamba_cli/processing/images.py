"""Opening pictures: from a path, from bytes, as PIL images or as arrays, always as 8-bit RGB.

The rules are those of `Image.open(...).convert("RGB")`, with which the published models were
trained and evaluated, wherever that is well defined:

- the EXIF orientation is not applied;
- transparency is dropped: the colours stored below it show, nothing is composited;
- CMYK is converted by PIL's plain formula, without colour profiles;
- 1-bit and palette pictures become their colours.

It is not well defined, and differs between PIL versions, for 16-bit greys: they are scaled to
8 bits here (65535 is white), never clipped. What is shown otherwise than in the file comes with an
`ImageNote`, a warning that names the picture:

- of several frames or pages the first is taken (of a PIL image the one it is at, without a note);
- of 32-bit and floating-point values white is 1, 255 or 65535, the first of them that none exceeds;
  beyond that, and below 0, the lowest value is black and the highest white;
- Lab is converted to sRGB, for which PIL has no plain formula.

Which pictures belong to which text, for the ways in which callers nest them.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from mmmamba_cli.errors import DataError, MmmambaWarning
from mmmamba_cli.processing.chat_template import (
    IMAGE_PLACEHOLDER,
    ConversationInput,
    ImageSlot,
    PromptPart,
)

ImageSource = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor

# From here on PIL warns of a decompression bomb; as 8-bit RGB it is 256 MiB.
MAX_PIXELS = 89_478_485

# Camera files whose further frames are previews or the other eye of a stereo pair.
STILL_FORMATS = frozenset({"MPO"})

# Grey, colour, and colour with transparency.
CHANNELS = (1, 3, 4)

# What PIL's decoders raise for damaged data.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)

# Values that stand for white where a file does not say which: of shares, of 8 and of 16 bits.
WHITE_VALUES = (1, 255, 65535)


class ImageNote(MmmambaWarning):
    """A picture was shown otherwise than its file says; see the module."""


def open_image(
    source: ImageSource, *, label: str = "the image", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open one picture as 8-bit RGB; a PIL image that is given is left as it was.

    `source` is a path, the bytes of an image file, a PIL image, or an array or tensor (H, W),
    (H, W, C) or (C, H, W) of uint8 or of floats from 0 to 1. `label` names it in errors where it
    has no path. Warns with an `ImageNote` if it is animated or paged, or has values whose white
    is not fixed. Raises `DataError`, in one sentence naming the picture, if it is missing, damaged,
    truncated, empty, larger than `max_pixels`, or has values that are not finite numbers.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, label, max_pixels)
    if isinstance(source, np.ndarray | torch.Tensor):
        return _to_rgb(_from_array(source, label), label, max_pixels)
    if isinstance(source, bytes):
        name = f"{label} ({len(source)} bytes)"
        with _opened(io.BytesIO(source), name) as image:
            return _to_rgb(image, name, max_pixels, from_file=True)
    if not isinstance(source, str | Path):
        raise DataError(
            f"{label} is a {type(source).__name__}, expected a path, bytes, a PIL image, an array "
            "or a tensor"
        )
    if str(source).startswith(("http://", "https://")):
        raise DataError(f"image {source} is an address, not a file", "download it first")
    name = f"image {source}"
    with _opened(Path(source), name) as image:
        return _to_rgb(image, name, max_pixels, from_file=True)


def image_size(source: ImageSource, *, label: str = "the image") -> tuple[int, int]:
    """(width, height) as the file's header says; its pixels are not decoded.

    Raises `DataError` as `open_image` does, as far as the header tells.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        source = _from_array(source, label)
    if isinstance(source, Image.Image):
        return source.size
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    name = f"image {file}" if isinstance(file, Path) else label
    with _opened(file, name) as image:
        _check_size(image, name, MAX_PIXELS)
        return image.size


def _from_array(values: np.ndarray | torch.Tensor, label: str) -> Image.Image:
    """A picture from its values; channels come first where both ends could be channels."""
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16.
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    shape = values.shape
    if values.ndim == 3 and shape[0] in CHANNELS:
        values = values.transpose(1, 2, 0)
    elif values.ndim != 2 and not (values.ndim == 3 and shape[2] in CHANNELS):
        raise DataError(
            f"{label} is an array of shape {tuple(shape)}, expected (H, W), (H, W, C) or (C, H, W) "
            "with C = 1, 3 or 4"
        )
    if 0 in shape:
        raise DataError(f"{label} is empty: an array of shape {tuple(shape)}")
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        # A comparison that NaN fails too.
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"{label} has floating-point values from {low:g} to {high:g}, expected 0 to 1",
                "scale them, or give uint8 from 0 to 255",
            )
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise DataError(
            f"{label} is an array of {values.dtype}, expected uint8, or floats from 0 to 1",
            "convert it, for example with array.astype('uint8')",
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(values))


@contextmanager
def _opened(file: Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """`Image.open`, which reads the header only, with its errors as ours."""
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large: {error}", "scale it down first") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not in an image format that PIL can read") from error
    except FileNotFoundError as error:
        raise DataError(f"{name} does not exist") from error
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    except _DECODE_ERRORS as error:
        raise DataError(f"{name} is damaged: {error}") from error
    with image:
        yield image


def _to_rgb(image: Image.Image, name: str, max_pixels: int, from_file: bool = False) -> Image.Image:
    _check_size(image, name, max_pixels)
    try:
        _load(image, name, from_file)
        return _convert(image, name)
    except _DECODE_ERRORS as error:
        raise DataError(f"{name} is damaged or truncated: {error}") from error


def _load(image: Image.Image, name: str, from_file: bool) -> None:
    try:
        # Before the pixels: PIL closes a TIFF after loading unless its pages were counted.
        frames = getattr(image, "n_frames", 1)
        image.load()
        # Of a PIL image the caller has chosen the frame.
        if from_file and frames > 1 and image.format not in STILL_FORMATS:
            _warn(f"{name} has {frames} frames or pages; the first is taken")
    except (IndexError, KeyError, TypeError) as error:
        # PIL's own opening takes these for damage too; its decoding lets them out.
        raise DataError(f"{name} is damaged: {error}") from error


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name} is empty: {width} x {height} pixels")
    if width * height > max_pixels:
        raise DataError(
            f"{name} is too large: {width} x {height} pixels, at most {max_pixels} are allowed",
            "scale it down first",
        )


def _convert(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        return _scale_16_bit(np.asarray(image))
    if mode == "I":
        # Older PIL versions open 16-bit files in this 32-bit mode.
        values = np.asarray(image)
        if values.min() >= 0 and values.max() <= 65535:
            return _scale_16_bit(values)
    if mode in ("I", "F"):
        return _scale_wide(np.asarray(image, dtype=np.float64), name)
    if mode == "LAB":
        _warn(f"{name} has Lab colours; they are converted to sRGB")
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if mode == "P":
        # The same colours as straight to RGB, without PIL's warning about transparency.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale_16_bit(values: np.ndarray) -> Image.Image:
    """0..65535 to 0..255, rounded to nearest: 65535 / 255 = 257."""
    grey = (values.astype(np.int64) + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _scale_wide(values: np.ndarray, name: str) -> Image.Image:
    """Greys of any range to 0..255, rounded to nearest; says what was taken for black and white."""
    if not np.isfinite(values).all():
        raise DataError(
            f"{name} has values that are not finite numbers", "save it again as 8-bit or 16-bit"
        )
    low, high = float(values.min()), float(values.max())
    fitting = [white for white in WHITE_VALUES if high <= white]
    black, white = (0.0, float(fitting[0])) if fitting and low >= 0 else (low, high)
    _warn(
        f"{name} has values from {low:g} to {high:g} without a fixed range; {black:g} is taken for "
        f"black and {white:g} for white"
    )
    grey = np.rint((values - black) * (255 / (white - black or 1)))
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _warn(text: str) -> None:
    warnings.warn(ImageNote(text), stacklevel=2)


ImagesInput = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource] | None]


def is_list(value: object) -> bool:
    """Whether it is a list of things, and not a thing: a batch of pictures as one array is."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 4
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_image_list(images: Any) -> list[ImageSource]:
    """None, one picture or a list of them, as a list."""
    if images is None:
        return []
    return list(images) if is_list(images) else [images]


def split_images_by_text(images: Any, wanted: list[int]) -> list[list[ImageSource]]:
    """A list of pictures for each text, of which text i has `wanted[i]` places."""
    listed = as_image_list(images)
    if any(is_list(one) for one in listed):
        if len(listed) != len(wanted):
            raise DataError(f"there are {len(wanted)} texts and {len(listed)} lists of images")
        return [as_image_list(one) for one in listed]
    if sum(wanted) != len(listed):
        raise DataError(
            f"the text has {sum(wanted)} {IMAGE_PLACEHOLDER} but {len(listed)} images are given",
            f"write {IMAGE_PLACEHOLDER} once for each image",
        )
    rest = iter(listed)
    return [[next(rest) for _ in range(count)] for count in wanted]


def split_images_by_conversation(
    conversation: Any, images: Any
) -> tuple[list[ConversationInput], list[list[ImageSource]]]:
    """Conversations and the pictures of each, from one of them or several."""
    if not isinstance(conversation, str) and not conversation:
        raise DataError("there is no conversation", "pass a question or at least one message")
    if isinstance(conversation, str) or isinstance(conversation[0], Mapping):
        pictures = as_image_list(images)
        # `[[picture]]` for a single conversation, as transformers nests them.
        nested = len(pictures) == 1 and is_list(pictures[0])
        return [conversation], [as_image_list(pictures[0]) if nested else pictures]
    if images is None:
        return list(conversation), [[] for _ in conversation]
    if not is_list(images) or len(images) != len(conversation):
        raise DataError(
            f"there are {len(conversation)} conversations, but images is not a list of as many "
            "lists of images"
        )
    return list(conversation), [as_image_list(one) for one in images]


def fill_slots(parts: Sequence[PromptPart], given: Sequence[ImageSource]) -> list[ImageSource]:
    """The pictures of a prompt in the order of its slots, `given` ones where a slot has none.

    What is given beyond the slots stays at the end, for `check_images` to find.
    """
    rest = iter(given)
    slots = [part for part in parts if isinstance(part, ImageSlot)]
    found = [next(rest, None) if slot.source is None else slot.source for slot in slots]
    return [one for one in found if one is not None] + list(rest)
