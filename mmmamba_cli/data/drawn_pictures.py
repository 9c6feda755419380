"""Pictures of generated corpora as whole images, for processors that tile them themselves."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from PIL import Image

from mmmamba_cli.data.generated_corpus import SampleGenerator
from mmmamba_cli.data.sample import Drawing
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import Tiling

# A picture that would take more square tiles is drawn as one tile and resized.
MAX_TILES = 64


def draw_pictures(generator: SampleGenerator, drawings: Sequence[Drawing]) -> list[Image.Image]:
    """Draw pictures on the CPU, each of its own width and height.

    A generator draws tiles. The tiles of the largest square that divides a picture make it up
    exactly; without such a square one tile is drawn, and stretched to the picture's shape.

    Raises:
        DataError: the generator draws another shape.
    """
    return [_draw(generator, drawing) for drawing in drawings]


def _draw(generator: SampleGenerator, drawing: Drawing) -> Image.Image:
    width, height = drawing.width, drawing.height
    side = gcd(width, height)
    columns, rows = width // side, height // side
    if columns * rows > MAX_TILES:
        side, columns, rows = max(width, height), 1, 1
    tiling = Tiling(side, columns * rows, columns * rows, use_thumbnail=False)
    pixels = generator.to_pixels(generator.stack([drawing], tiling), torch.device("cpu"))
    expected = (columns * rows, 3, side, side)
    if tuple(pixels.shape) != expected or pixels.dtype != torch.uint8:
        raise DataError(
            f"the corpus drew pixels {tuple(pixels.shape)} of {pixels.dtype}, expected {expected} "
            "of torch.uint8",
            "correct to_pixels of its package",
        )
    # (rows, columns, 3, side, side) to (rows, side, columns, side, 3).
    whole = pixels.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    image = Image.fromarray(whole.reshape(rows * side, columns * side, 3).contiguous().numpy())
    return image if image.size == (width, height) else image.resize((width, height))
