"""What a picture shows, before anyone has drawn it.

Lengths are in pixels of the picture, x to the right and y down; angles in degrees, anticlockwise;
colours are RGB of 0 to 255. Who draws it, on paper of PIL or on a GPU, decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Background:
    """`first` and `second` mixed by a wave or a ramp; a flat one has them equal.

    The share of `second` at (x, y) is, with s = x cos a + y sin a in units of the picture's width
    and c the same turned by 90 degrees: s clipped to 0..1 for a gradient; (1 + sin(2 pi f s)
    sin(2 pi f c)) / 2 for a texture of frequency f.
    """

    kind: str
    first: RGB
    second: RGB
    angle: float = 0.0
    frequency: float = 0.0


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawing in the picture: number `variant` of its class, its longest side `size`.

    (x, y) is its centre. `colour` is the name of the hue it was turned to, None as it was drawn.
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
    """A word in a font; `height` is that of its letters' box, `width` what is left for it."""

    word: str
    font: int
    x: float
    y: float
    height: float
    width: float
    colour: RGB


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture of `width` x `height`; nothing in it covers anything else in it."""

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
