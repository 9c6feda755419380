"""Image processor: images to `pixel_values`. Uses PIL only, with or without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_processing_utils import BatchFeature as ImageFeature

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing.images import (
    MAX_PIXELS,
    ImageSource,
    as_image_list,
    is_list,
    open_image,
)
from mmmamba_cli.processing.processor_kwargs import TILING_KWARGS, HolisticVLMImagesKwargs
from mmmamba_cli.processing.tiling import Tiling, cut_tiles, normalize, stack_tiles

# Keys that transformers adds to the saved settings.
_SAVED_METADATA = ("image_processor_type", "processor_class", "auto_map", "feature_extractor_type")


class ImageProcessor(BaseImageProcessor):
    """Open, tile and normalise images; saved and loaded like transformers' image processors.

    `image_size` is S, the side of a tile in pixels. An image is cut into `min_tiles` to `max_tiles`
    tiles, plus the thumbnail if `use_thumbnail`. Images of more than `max_pixels` pixels are
    refused.

    Raises:
        DataError: no grid has these numbers of tiles.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = HolisticVLMImagesKwargs

    # `kwargs` holds the keys that transformers saves with an image processor.
    def __init__(
        self,
        image_size: int = 448,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ):
        unknown = [name for name in kwargs if name not in _SAVED_METADATA]
        if unknown:
            raise TypeError(f"ImageProcessor has no setting {unknown[0]!r}")
        super().__init__()
        self.image_size = image_size
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles
        self.use_thumbnail = use_thumbnail
        self.max_pixels = max_pixels
        # Raises for numbers of tiles that fit no grid.
        self.tiling  # noqa: B018

    @property
    def tiling(self) -> Tiling:
        """The settings of tiling."""
        return Tiling(self.image_size, self.min_tiles, self.max_tiles, self.use_thumbnail)

    def with_tile_limits(self, min_tiles: int | None, max_tiles: int | None) -> ImageProcessor:
        """Copy with other numbers of tiles; None keeps a number."""
        return ImageProcessor(
            self.image_size,
            self.min_tiles if min_tiles is None else min_tiles,
            self.max_tiles if max_tiles is None else max_tiles,
            self.use_thumbnail,
            self.max_pixels,
        )

    def preprocess(
        self,
        images: ImageSource | Sequence[ImageSource],
        *args: Any,
        return_tensors: str | None = "pt",
        return_num_tiles: bool | None = None,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        **kwargs: Any,
    ) -> ImageFeature:
        """Return `pixel_values` (sum of tiles, 3, S, S), float32, and optionally `num_tiles`.

        `images` is an image or a list of images.

        Raises:
            DataError: an image cannot be used, or a keyword would change tiling or normalisation.
        """
        changed = [name for name, value in kwargs.items() if value is not None]
        if args or changed:
            raise DataError(
                f"the image processor does not take {(*changed, 'positional options')[0]}",
                f"keywords are {', '.join(sorted(TILING_KWARGS))} and return_tensors",
            )
        listed: list[Any] = list(as_image_list(images))
        flat = [one for item in listed for one in (item if is_list(item) else [item])]
        pixels, counts = self.with_tile_limits(min_tiles, max_tiles).tile(flat)
        found: dict[str, Any] = {"pixel_values": to_requested_type(pixels, return_tensors)}
        if return_num_tiles:
            found["num_tiles"] = counts
        return ImageFeature(found)

    def tile(self, images: Sequence[ImageSource]) -> tuple[Tensor, list[int]]:
        """Tiles of the images (sum of tiles, 3, S, S), normalised float32, and tiles per image.

        Raises:
            DataError: an image cannot be used, see `open_image`.
        """
        pixels, counts = self.tile_uint8(images)
        return normalize(pixels), counts

    def tile_uint8(self, images: Sequence[ImageSource]) -> tuple[Tensor, list[int]]:
        """Tiles as by `tile` before `normalize`, uint8: a quarter of the bytes to transfer."""
        size, tiling = self.image_size, self.tiling
        pixels = [torch.empty(0, 3, size, size, dtype=torch.uint8)]
        for index, source in enumerate(images, start=1):
            image = open_image(source, label=f"image {index}", max_pixels=self.max_pixels)
            pixels.append(stack_tiles(cut_tiles(image, tiling)))
        return torch.cat(pixels), [len(tiles) for tiles in pixels[1:]]


def to_requested_type(pixels: Tensor, return_tensors: str | None) -> Any:
    """Convert float32 pixels to `return_tensors`, "np" or a tensor."""
    kind = getattr(return_tensors, "value", return_tensors)
    return pixels.numpy() if kind == "np" else pixels
