"""The reference renderer of scenes, with PIL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.fonts import word_mask
from mmmamba_evals.scenes.hues import turn_hue
from mmmamba_evals.scenes.scene import Background, Lettering, Scene, Thing
from mmmamba_evals.scenes.world import COLOURS


def render(scene: Scene, atlas: Atlas) -> Image.Image:
    """The scene as an RGB picture of `scene.width` x `scene.height`."""
    canvas = draw_background(scene.background, scene.width, scene.height)
    picture = Image.fromarray(np.round(canvas).astype(np.uint8), "RGB")
    for thing in scene.things:
        drawing = _drawing(thing, atlas)
        corner = (round(thing.x - drawing.width / 2), round(thing.y - drawing.height / 2))
        picture.paste(drawing, corner, drawing)
    for lettering in scene.letterings:
        _write(picture, lettering)
    return picture


def draw_background(background: Background, width: int, height: int) -> np.ndarray:
    """(height, width, 3) float of 0..255; see `Background` for the formula."""
    first = np.array(background.first, np.float64)
    if background.kind == "flat":
        return np.broadcast_to(first, (height, width, 3)).copy()
    y, x = np.mgrid[0:height, 0:width] / width
    angle = math.radians(background.angle)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if background.kind == "gradient":
        share = np.clip(along, 0, 1)
    else:
        turns = 2 * math.pi * background.frequency
        share = (1 + np.sin(turns * along) * np.sin(turns * across)) / 2
    second = np.array(background.second, np.float64)
    return first + (second - first) * share[..., None]


def _drawing(thing: Thing, atlas: Atlas) -> Image.Image:
    """The sprite recoloured, mirrored, scaled and rotated, ready to be pasted."""
    sprite = atlas.sprites[thing.name][thing.variant]
    pixels = sprite.pixels
    if thing.colour is not None and sprite.hue is not None:
        turned = turn_hue(pixels[..., :3] / 255, COLOURS[thing.colour] - sprite.hue)
        pixels = np.concatenate((np.round(turned * 255).astype(np.uint8), pixels[..., 3:]), -1)
    image = Image.fromarray(pixels, "RGBA")
    if thing.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = thing.size / max(turned_size(image.width, image.height, thing.angle))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    return image.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)


def turned_size(width: float, height: float, angle: float) -> tuple[float, float]:
    """Width and height of the bounding box of a box rotated by `angle` degrees."""
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    return width * cosine + height * sine, width * sine + height * cosine


def _write(picture: Image.Image, lettering: Lettering) -> None:
    mask = Image.fromarray(word_mask(lettering.word, lettering.font), "L")
    scale = min(lettering.width / mask.width, lettering.height / mask.height)
    size = (max(1, round(mask.width * scale)), max(1, round(mask.height * scale)))
    mask = mask.resize(size, Image.Resampling.BICUBIC)
    corner = (round(lettering.x - size[0] / 2), round(lettering.y - size[1] / 2))
    picture.paste(lettering.colour, corner, mask)


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of equal size in a grid, with a line between them."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + 2), i // columns * (height + 2)))
    return sheet
