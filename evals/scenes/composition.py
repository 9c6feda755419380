"""Composition of scenes from their contents: backgrounds, sizes and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mmmamba_evals.scenes.layout import Box, place_boxes
from mmmamba_evals.scenes.scene import RGB, Background, Lettering, Scene, Thing
from mmmamba_evals.scenes.world import World

SIDE = 224
# Longest side of a thing in pixels, and that in scenes with more than CROWDED things.
SIZE_RANGE, CROWDED_SIZE_RANGE, CROWDED = (40.0, 100.0), (36.0, 72.0), 5
MAX_TILT_DEGREES = 12.0
LETTER_HEIGHT_RANGE = (28.0, 48.0)
# Letter width relative to its height, and the largest share of the picture's width for a word.
LETTER_ASPECT, MAX_WORD_WIDTH = 0.7, 0.88
# Smallest difference in brightness (0 to 255) between a word and its background.
MIN_CONTRAST = 110.0


@dataclass(frozen=True, slots=True)
class Content:
    """`count` things of a class, recoloured to `colour` if it is given."""

    name: str
    count: int = 1
    colour: str | None = None


def compose(
    rng: Random,
    world: World,
    contents: Sequence[Content],
    words: Sequence[str] = (),
    width: int = SIDE,
    height: int = SIDE,
) -> Scene:
    """A scene with these contents at random sizes and positions, in pixels."""
    background = _background(rng)
    wanted = [one for one in contents for _ in range(one.count)]
    low, high = CROWDED_SIZE_RANGE if len(wanted) > CROWDED else SIZE_RANGE
    sizes = [rng.uniform(low, high) for _ in wanted]
    boxes = [(size, size) for size in sizes]
    for word in words:
        letters = rng.uniform(*LETTER_HEIGHT_RANGE)
        word_width = min(letters * LETTER_ASPECT * len(word), MAX_WORD_WIDTH * width)
        boxes.append((word_width, letters))
    places = place_boxes(rng, boxes, width, height)
    letterings = tuple(
        _lettering(rng, world, word, box, _readable(rng, background))
        for word, box in zip(words, places[len(wanted) :], strict=True)
    )
    things = tuple(
        _thing(rng, world, one, x, y, size)
        for one, (x, y, size, _) in zip(wanted, places[: len(wanted)], strict=True)
    )
    return Scene(width, height, background, things, letterings)


def _lettering(rng: Random, world: World, word: str, box: Box, colour: RGB) -> Lettering:
    x, y, width, height = box
    return Lettering(word, rng.choice(world.fonts), x, y, height, width, colour)


def _thing(rng: Random, world: World, one: Content, x: float, y: float, size: float) -> Thing:
    if one.colour is None:
        variant = rng.randrange(world.variants[one.name])
    else:
        variant = rng.choice(world.colourable[one.name])
    angle, flip = rng.uniform(-MAX_TILT_DEGREES, MAX_TILT_DEGREES), rng.random() < 0.5
    return Thing(one.name, variant, x, y, size, angle, flip, one.colour)


def _background(rng: Random) -> Background:
    kind = rng.choice(("flat", "gradient", "texture"))
    first = _muted(rng)
    if kind == "flat":
        return Background(kind, first, first)
    # Similar shades, so that the background is not mistaken for an object.
    second = tuple(min(255, max(0, part + rng.randint(-45, 45))) for part in first)
    angle, frequency = rng.uniform(0, 180), rng.uniform(1.5, 8.0)
    return Background(kind, first, (second[0], second[1], second[2]), angle, frequency)


def _muted(rng: Random) -> RGB:
    """A random colour of low saturation, which has none of the hues that questions name."""
    grey, spread = rng.randint(40, 245), 32
    parts = [min(255, max(0, grey + rng.randint(-spread, spread))) for _ in range(3)]
    return parts[0], parts[1], parts[2]


def _readable(rng: Random, background: Background) -> RGB:
    behind = (brightness(background.first) + brightness(background.second)) / 2
    while True:
        colour = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        if abs(brightness(colour) - behind) >= MIN_CONTRAST:
            return colour


def brightness(colour: RGB) -> float:
    """Luma of 0 to 255 (ITU-R BT.601)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
