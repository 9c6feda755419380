"""The largest number of tiles of a picture, in the terms of a family's own image processor."""

from __future__ import annotations

import copy
from typing import Any

# Pixels of a tile of HoVLE and InternVL. Families without tiles get the area of as many.
TILE_PIXELS = 448 * 448
# Their `size` has the smallest and the largest area in pixels as `shortest_edge`, `longest_edge`.
AREA_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")


def takes_max_tiles(processor: Any) -> bool:
    """Whether `with_max_tiles` limits the pictures of a processor of transformers."""
    images = getattr(processor, "image_processor", None)
    return _cuts_tiles(images) or type(images).__name__ in AREA_PROCESSORS


def with_max_tiles(processor: Any, max_tiles: int) -> Any:
    """A processor whose pictures are no larger than `max_tiles` tiles, a thumbnail not counted.

    Image processors that cut pictures into tiles get their `max_patches`, those of Qwen-VL an area
    of as many tiles of 448 x 448 pixels; neither is raised. Others keep their own resolution.
    """
    if not takes_max_tiles(processor):
        return processor
    images = copy.copy(processor.image_processor)
    if _cuts_tiles(images):
        images.max_patches = max(images.min_patches, min(images.max_patches, max_tiles))
    else:
        size = dict(images.size)
        largest = min(size["longest_edge"], max_tiles * TILE_PIXELS)
        size["longest_edge"] = max(size["shortest_edge"], largest)
        images.size = type(images.size)(**size)
    limited = copy.copy(processor)
    limited.image_processor = images
    return limited


def _cuts_tiles(images: Any) -> bool:
    return bool(getattr(images, "crop_to_patches", False)) and hasattr(images, "max_patches")
