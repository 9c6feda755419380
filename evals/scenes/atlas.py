"""An atlas: a folder with a folder for each class of things, `CLASS/*.png`, of any origin.

Pictures with transparency are cut-outs. A photograph has none, and stands in a scene as it is, a
rectangle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmmamba_cli.errors import DataError, name_some
from mmmamba_cli.processing import open_image
from mmmamba_evals.scenes.hues import dominant_hue

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
# A sprite is kept no larger than it can appear, and one smaller than this shows nothing.
LARGEST, SMALLEST = 128, 16
# Alpha from which on a pixel counts as seen.
SEEN = 16


@dataclass(frozen=True)
class Sprite:
    """One drawing: `pixels` (h, w, 4) uint8, cut to what can be seen.

    `hue` in turns, if one saturated hue dominates.
    """

    file: Path
    pixels: np.ndarray
    hue: float | None


@dataclass(frozen=True)
class Atlas:
    """Sprites by class name; `digest` changes with any pixel or name."""

    folder: Path
    sprites: Mapping[str, tuple[Sprite, ...]]
    digest: str


def open_atlas(folder: Path) -> Atlas:
    """Read an atlas. A class folder's name is the noun, `_` for a space.

    Raises `DataError`, in one sentence, for a folder without classes, a class without pictures, and
    pictures that are damaged, empty, or too small to show anything.
    """
    if not folder.is_dir():
        raise DataError(f"atlas {folder} does not exist", "expected a folder with CLASS/*.png")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    classes = [path for path in classes if not path.name.startswith(".")]
    if not classes:
        raise DataError(f"atlas {folder} has no class folders", "expected CLASS/*.png in it")
    files = {path: _pictures(path) for path in classes}
    empty = [path.name for path, found in files.items() if not found]
    if empty:
        raise DataError(
            f"atlas {folder} has no pictures for {name_some(empty)}",
            f"put {', '.join(SUFFIXES)} files there, or remove the folder",
        )
    names = [path.name.replace("_", " ") for path in classes]
    sprites = {
        name: tuple(read_sprite(file) for file in files[path])
        for name, path in zip(names, classes, strict=True)
    }
    return Atlas(folder, sprites, _digest(sprites))


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def read_sprite(file: Path) -> Sprite:
    """One picture, cut to what is seen of it and scaled down to at most LARGEST."""
    image = _open(file)
    pixels = np.asarray(image)
    seen = pixels[..., 3] >= SEEN
    if not seen.any():
        raise DataError(f"{file} is fully transparent", "remove it from the atlas")
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    image = image.crop(box)
    if max(image.size) < SMALLEST:
        raise DataError(
            f"{file} shows {image.width} x {image.height} pixels, at least {SMALLEST} on its "
            "longer side are needed",
            "remove it from the atlas",
        )
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    array = np.asarray(image).copy()
    return Sprite(file, array, dominant_hue(array))


def _open(file: Path) -> Image.Image:
    """RGBA; opaque where the file has no transparency."""
    # Checks the file as every picture is checked, and names it if it is damaged.
    plain = open_image(file)
    with Image.open(file) as image:
        has_alpha = "A" in image.getbands() or "transparency" in image.info
        return image.convert("RGBA") if has_alpha else plain.convert("RGBA")


def _digest(sprites: Mapping[str, tuple[Sprite, ...]]) -> str:
    found = hashlib.sha256()
    for name, drawings in sprites.items():
        for drawing in drawings:
            found.update(f"{name} {drawing.pixels.shape}".encode())
            found.update(drawing.pixels.tobytes())
    return found.hexdigest()


def merge_atlases(atlases: Sequence[Atlas]) -> Atlas:
    """Several styles as one atlas: a class has the drawings of all that know it, in this order."""
    sprites: dict[str, tuple[Sprite, ...]] = {}
    for atlas in atlases:
        for name, drawings in atlas.sprites.items():
            sprites[name] = sprites.get(name, ()) + drawings
    return Atlas(atlases[0].folder, sprites, _digest(sprites))
