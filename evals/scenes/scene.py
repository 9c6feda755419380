"""Descriptions of scenes, independent of the renderer.

Lengths are in pixels, x to the right and y down; angles in degrees, anticlockwise; colours are RGB
of 0 to 255.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Background:
    """A flat colour, or `first` and `second` blended by a gradient or a texture.

    The share of `second` at (x, y) is s clipped to 0..1 for a gradient, and (1 + sin(2 pi f s)
    sin(2 pi f c)) / 2 for a texture of frequency f, where s = x cos a + y sin a in units of the
    picture's width and c is s rotated by 90 degrees.
    """

    kind: str
    first: RGB
    second: RGB
    angle: float = 0.0
    frequency: float = 0.0


@dataclass(frozen=True, slots=True)
class Thing:
    """One sprite in the picture: `variant` of class `name`, with centre (x, y).

    `size` is the longest side. `colour` names the hue it is recoloured to, None for its own.
    """

    name: str
    variant: int
    x: float
    y: float
    size: float
    angle: float = 0.0
    flip: bool = False
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Lettering:
    """A word in a font, fitted into a box of `width` x `height` with centre (x, y)."""

    word: str
    font: int
    x: float
    y: float
    height: float
    width: float
    colour: RGB


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture of `width` x `height` whose objects do not overlap."""

    width: int
    height: int
    background: Background
    things: tuple[Thing, ...]
    letterings: tuple[Lettering, ...] = ()

    def named(self, name: str) -> list[Thing]:
        return [thing for thing in self.things if thing.name == name]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene; its answer is one or a few words."""

    category: str
    text: str
    answer: str
