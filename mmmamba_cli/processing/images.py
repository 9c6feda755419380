"""Image input: paths, bytes, PIL images and arrays as 8-bit RGB; nested lists of images.

Images are converted as by `Image.open(...).convert("RGB")`, with which the published models were
trained and evaluated:

- the EXIF orientation is not applied, unless a reader asks for `upright` images, as transformers
  reads them;
- transparency is dropped, and the stored colours below it are kept;
- CMYK is converted by PIL's formula, without colour profiles;
- 1-bit and palette images are converted to their colours.

PIL versions differ for 16-bit greys; here they are scaled to 8 bits (65535 is white), not clipped.
Conversions that lose information warn with an `ImageNote`, which names the image:

- of several frames or pages the first is taken (of a PIL image the current one, without a warning);
- for 32-bit and floating-point values, white is the first of 1, 255 and 65535 that no value
  exceeds; with larger or negative values, the minimum is black and the maximum white;
- Lab is converted to sRGB by a colour profile.
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
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmmamba_cli.errors import DataError, MmmambaWarning
from mmmamba_cli.processing.chat_template import (
    IMAGE_PLACEHOLDER,
    ConversationInput,
    ImageSlot,
    PromptPart,
)

ImageSource = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor
# PIL's limit before its decompression bomb warning; 256 MiB as 8-bit RGB.
MAX_PIXELS = 89_478_485
# Camera formats whose further frames are previews or the other image of a stereo pair.
STILL_FORMATS = frozenset({"MPO"})
# Numbers of channels: grey, RGB, RGBA.
CHANNELS = (1, 3, 4)
# Exceptions of PIL's decoders for damaged data.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
# EXIF orientations that swap width and height.
TURNED = (5, 6, 7, 8)
# Candidates for white without a fixed range: floats from 0 to 1, 8-bit and 16-bit values.
WHITE_VALUES = (1, 255, 65535)
ImagesInput = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource] | None]


class ImageNote(MmmambaWarning):
    """The conversion to 8-bit RGB lost information; see the module."""


def open_image(
    source: ImageSource,
    *,
    label: str = "the image",
    max_pixels: int = MAX_PIXELS,
    upright: bool = False,
) -> Image.Image:
    """Open an image as 8-bit RGB; a PIL image is not modified.

    `source` is a path, the bytes of an image file, a PIL image, or an array or tensor (H, W),
    (H, W, C) or (C, H, W) of uint8 or of floats from 0 to 1. `label` names an image without a path
    in messages. `upright` applies the EXIF orientation of a file. Warns with an `ImageNote` for
    several frames or pages, for values without a fixed range and for Lab colours.

    Raises:
        DataError: the image is missing, damaged, truncated, empty, larger than `max_pixels`, or has
            values that are not finite.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, label, max_pixels)
    if isinstance(source, np.ndarray | torch.Tensor):
        return _to_rgb(_from_array(source, label), label, max_pixels)
    if isinstance(source, bytes):
        name = f"{label} ({len(source)} bytes)"
        with _opened(io.BytesIO(source), name) as image:
            return _to_rgb(image, name, max_pixels, from_file=True, upright=upright)
    if not isinstance(source, str | Path):
        raise DataError(
            f"{label} is a {type(source).__name__}, expected a path, bytes, a PIL image, an array "
            "or a tensor"
        )
    if str(source).startswith(("http://", "https://")):
        raise DataError(f"image {source} is an address, not a file", "download it first")
    name = f"image {source}"
    with _opened(Path(source), name) as image:
        return _to_rgb(image, name, max_pixels, from_file=True, upright=upright)


def image_size(
    source: ImageSource, *, label: str = "the image", upright: bool = False
) -> tuple[int, int]:
    """(width, height) from the file header, without decoding the pixels.

    `upright` applies the EXIF orientation of a file.

    Raises `DataError` for the errors of `open_image` that show in the header.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        source = _from_array(source, label)
    if isinstance(source, Image.Image):
        return source.size
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    name = f"image {file}" if isinstance(file, Path) else label
    with _opened(file, name) as image:
        _check_size(image, name, MAX_PIXELS)
        width, height = image.size
        return (height, width) if upright and _is_turned(image, name) else (width, height)


def _is_turned(image: Image.Image, name: str) -> bool:
    """Whether the EXIF orientation swaps width and height."""
    # PIL decodes a PNG to look for metadata behind its pixels.
    if image.format == "PNG" and "exif" not in image.info:
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in TURNED
    except _DECODE_ERRORS as error:
        raise DataError(f"{name} is damaged: {error}") from error


def is_list(value: object) -> bool:
    """Whether `value` is a list, or an array or tensor of several images."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 4
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_image_list(images: Any) -> list[ImageSource]:
    """None, an image or a list of images as a list."""
    if images is None:
        return []
    return list(images) if is_list(images) else [images]


def split_images_by_text(images: Any, wanted: list[int]) -> list[list[ImageSource]]:
    """Assign images to texts; text i has `wanted[i]` slots."""
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
    """Lists of conversations and of the images of each, from one conversation or several."""
    if not isinstance(conversation, str) and not conversation:
        raise DataError("there is no conversation", "pass a question or at least one message")
    if isinstance(conversation, str) or isinstance(conversation[0], Mapping):
        pictures = as_image_list(images)
        # `[[image]]` for a single conversation, as in transformers.
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
    """Images of a prompt in the order of its slots; `given` images fill slots without one.

    Surplus images stay at the end, so that `check_images` reports them.
    """
    rest = iter(given)
    slots = [part for part in parts if isinstance(part, ImageSlot)]
    found = [next(rest, None) if slot.source is None else slot.source for slot in slots]
    return [one for one in found if one is not None] + list(rest)


def _from_array(values: np.ndarray | torch.Tensor, label: str) -> Image.Image:
    """Image from an array; channels come first if both ends could be channels."""
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
        # Written so that NaN fails the comparison.
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
    """`Image.open`, which reads the header only, with its errors as `DataError`."""
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


def _to_rgb(
    image: Image.Image,
    name: str,
    max_pixels: int,
    from_file: bool = False,
    upright: bool = False,
) -> Image.Image:
    _check_size(image, name, max_pixels)
    try:
        _load(image, name, from_file)
        if upright:
            image = ImageOps.exif_transpose(image)
        return _convert(image, name)
    except _DECODE_ERRORS as error:
        raise DataError(f"{name} is damaged or truncated: {error}") from error


def _load(image: Image.Image, name: str, from_file: bool) -> None:
    try:
        # Counted first: otherwise PIL closes a TIFF after loading.
        frames = getattr(image, "n_frames", 1)
        image.load()
        # The caller has chosen the frame of a PIL image.
        if from_file and frames > 1 and image.format not in STILL_FORMATS:
            _warn(f"{name} has {frames} frames or pages; the first is taken")
    except (IndexError, KeyError, TypeError) as error:
        # PIL treats these as damage when opening, but not when decoding.
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
        # Avoids PIL's warning about transparency; the colours are the same.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale_16_bit(values: np.ndarray) -> Image.Image:
    """0..65535 to 0..255, rounded to nearest: 65535 / 255 = 257."""
    grey = (values.astype(np.int64) + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _scale_wide(values: np.ndarray, name: str) -> Image.Image:
    """Greys of any range to 0..255, rounded to nearest, with a warning that names the range."""
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
