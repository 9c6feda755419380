"""An atlas of sprites: a folder with one subfolder of pictures per class, `CLASS/*.png`.

Pictures with transparency are cut-outs; opaque ones, such as photographs, are drawn as rectangles.
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
# Longest side of a sprite in pixels: no scene shows a larger one, and a smaller one is unreadable.
MAX_SPRITE_SIDE, MIN_SPRITE_SIDE = 128, 16
# Smallest alpha (0 to 255) of a visible pixel.
MIN_ALPHA = 16


@dataclass(frozen=True)
class Sprite:
    """One drawing: `pixels` (h, w, 4) uint8 RGBA, cropped to the visible part.

    `hue` is the dominant saturated hue in turns, None without one.
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
    """Read an atlas. The name of a class folder is the noun, with `_` for a space.

    Raises `DataError` for a folder without classes, a class without pictures, and pictures that are
    damaged, fully transparent or too small.
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
    """Read one picture, crop it to the visible part and scale it down to MAX_SPRITE_SIDE."""
    image = _open(file)
    pixels = np.asarray(image)
    visible = pixels[..., 3] >= MIN_ALPHA
    if not visible.any():
        raise DataError(f"{file} is fully transparent", "remove it from the atlas")
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    image = image.crop(box)
    if max(image.size) < MIN_SPRITE_SIDE:
        raise DataError(
            f"{file} shows {image.width} x {image.height} pixels, at least {MIN_SPRITE_SIDE} on "
            "its longer side are needed",
            "remove it from the atlas",
        )
    image.thumbnail((MAX_SPRITE_SIDE, MAX_SPRITE_SIDE), Image.Resampling.LANCZOS)
    array = np.asarray(image).copy()
    return Sprite(file, array, dominant_hue(array))


def _open(file: Path) -> Image.Image:
    """The picture as RGBA; opaque without transparency in the file."""
    # Raises `DataError` that names the file if it is damaged.
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
    """Merge atlases: a class has the sprites of all of them, in order."""
    sprites: dict[str, tuple[Sprite, ...]] = {}
    for atlas in atlases:
        for name, drawings in atlas.sprites.items():
            sprites[name] = sprites.get(name, ()) + drawings
    return Atlas(atlases[0].folder, sprites, _digest(sprites))
