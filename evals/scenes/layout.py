"""Where things go, so that none covers another. Boxes are (x, y, width, height) by centre."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mmmamba_cli.errors import DataError

Box = tuple[float, float, float, float]

# Pixels between any two boxes, and between a box and the edge.
GAP = 3.0
TRIES = 30
SHRINK = 0.85
ROUNDS = 12


def place_boxes(
    rng: Random, sizes: Sequence[tuple[float, float]], width: float, height: float
) -> list[Box]:
    """A place for each (width, height), none over another or the edge.

    Where they do not fit, all are made smaller. Raises `DataError` if even that does not help.
    """
    scale = 1.0
    for _ in range(ROUNDS):
        found = _try_to_place(rng, sizes, scale, width, height)
        if found is not None:
            return found
        scale *= SHRINK
    raise DataError(
        f"{len(sizes)} things do not fit into a picture of {width:.0f} x {height:.0f}",
        "ask for fewer things or a larger picture",
    )


def _try_to_place(
    rng: Random,
    sizes: Sequence[tuple[float, float]],
    scale: float,
    width: float,
    height: float,
) -> list[Box] | None:
    # The large ones first: they have the fewest places left.
    order = sorted(range(len(sizes)), key=lambda i: -max(sizes[i]))
    boxes: dict[int, Box] = {}
    for i in order:
        w, h = sizes[i][0] * scale, sizes[i][1] * scale
        box = _find_place(rng, w, h, list(boxes.values()), width, height)
        if box is None:
            return None
        boxes[i] = box
    return [boxes[i] for i in range(len(sizes))]


def _find_place(
    rng: Random, w: float, h: float, others: Sequence[Box], width: float, height: float
) -> Box | None:
    room_x, room_y = width - w - 2 * GAP, height - h - 2 * GAP
    if room_x < 0 or room_y < 0:
        return None
    for _ in range(TRIES):
        x = GAP + w / 2 + rng.random() * room_x
        y = GAP + h / 2 + rng.random() * room_y
        box = (x, y, w, h)
        if not any(overlap(box, other) for other in others):
            return box
    return None


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes come closer than the gap."""
    return (
        abs(one[0] - other[0]) < (one[2] + other[2]) / 2 + GAP
        and abs(one[1] - other[1]) < (one[3] + other[3]) / 2 + GAP
    )
