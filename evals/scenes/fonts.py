"""The shipped fonts, by index, and word masks drawn with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from io import BytesIO

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

SEEN, UNSEEN = "seen", "unseen"


@dataclass(frozen=True)
class Font:
    """A file in `fonts/`. `split`: whether the shipped teacher was trained on it."""

    file: str
    family: str
    licence: str
    split: str


@cache
def all_fonts() -> tuple[Font, ...]:
    text = (resources.files(__package__) / "fonts.yaml").read_text(encoding="utf-8")
    return tuple(Font(**entry) for entry in yaml.safe_load(text))


def fonts_of(split: str) -> tuple[int, ...]:
    """Indexes into `all_fonts`."""
    return tuple(i for i, font in enumerate(all_fonts()) if font.split == split)


@cache
def _load(index: int, size: int) -> ImageFont.FreeTypeFont:
    data = (resources.files(__package__) / "fonts" / all_fonts()[index].file).read_bytes()
    # Basic layout: Pillow's complex layout needs a system library, and pictures must not depend on
    # the machine.
    return ImageFont.truetype(BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)


def word_mask(word: str, font: int, size: int = 48) -> np.ndarray:
    """The word's coverage mask (h, w) uint8, cropped to the letters; `size` in pixels per em."""
    face = _load(font, size)
    left, top, right, bottom = face.getbbox(word)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), word, fill=255, font=face)
    box = image.getbbox()
    return np.asarray(image.crop(box) if box else image)
