"""From pictures to the tensor the model reads. PIL only, whether torchvision is there or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.processing.images import MAX_PIXELS, ImageSource, open_image
from mmmamba_cli.processing.tiling import Tiling, cut_tiles, normalize, stack_tiles


@dataclass(frozen=True)
class ImageProcessor:
    """Opens, tiles and normalises pictures."""

    tiling: Tiling
    max_pixels: int = MAX_PIXELS

    def __call__(self, images: Sequence[ImageSource]) -> tuple[Tensor, list[int]]:
        """Pictures -> their tiles (sum of tiles, 3, S, S) in float32, and the tiles of each.

        Raises `DataError` for a picture that cannot be used, see `open_image`.
        """
        pixels, counts = self.as_bytes(images)
        return normalize(pixels), counts

    def as_bytes(self, images: Sequence[ImageSource]) -> tuple[Tensor, list[int]]:
        """The same before `normalize`, as uint8: a quarter of the bytes to hand on."""
        size = self.tiling.image_size
        pixels = [torch.empty(0, 3, size, size, dtype=torch.uint8)]
        for index, source in enumerate(images, start=1):
            image = open_image(source, label=f"image {index}", max_pixels=self.max_pixels)
            pixels.append(stack_tiles(cut_tiles(image, self.tiling)))
        return torch.cat(pixels), [len(tiles) for tiles in pixels[1:]]
