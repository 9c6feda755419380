"""Random placement of boxes without overlap. A box is (x, y, width, height) by its centre."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mmmamba_cli.errors import DataError

Box = tuple[float, float, float, float]

# Smallest distance in pixels between two boxes, and between a box and the edge.
MIN_GAP = 3.0
TRIES_PER_BOX = 30
SHRINK_FACTOR = 0.85
MAX_ROUNDS = 12


def place_boxes(
    rng: Random, sizes: Sequence[tuple[float, float]], width: float, height: float
) -> list[Box]:
    """Place a box of each (width, height) without overlaps.

    All boxes shrink if they do not fit. Raises `DataError` after MAX_ROUNDS.
    """
    scale = 1.0
    for _ in range(MAX_ROUNDS):
        found = _try_to_place(rng, sizes, scale, width, height)
        if found is not None:
            return found
        scale *= SHRINK_FACTOR
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
    # Large boxes first: they have the fewest free positions.
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
    room_x, room_y = width - w - 2 * MIN_GAP, height - h - 2 * MIN_GAP
    if room_x < 0 or room_y < 0:
        return None
    for _ in range(TRIES_PER_BOX):
        x = MIN_GAP + w / 2 + rng.random() * room_x
        y = MIN_GAP + h / 2 + rng.random() * room_y
        box = (x, y, w, h)
        if not any(overlap(box, other) for other in others):
            return box
    return None


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes are closer than MIN_GAP."""
    return (
        abs(one[0] - other[0]) < (one[2] + other[2]) / 2 + MIN_GAP
        and abs(one[1] - other[1]) < (one[3] + other[3]) / 2 + MIN_GAP
    )
