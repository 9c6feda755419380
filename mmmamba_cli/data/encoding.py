"""From a sample to its ids; of pictures only the headers are read, which tell their tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmmamba_cli.data.samples import Sample
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import (
    ImageProcessor,
    ImageSource,
    TrainingProcessor,
    count_tiles,
    image_size,
)


@dataclass(frozen=True)
class Encoded:
    """A sample as ids. `is_answer` marks what labels are made of."""

    name: str
    ids: list[int]
    is_answer: list[bool]
    images: tuple[ImageSource, ...] = ()
    num_tiles: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Encodes samples for one model, cut to `max_length` tokens."""

    def __init__(self, processor: TrainingProcessor, max_length: int, max_tiles: int | None):
        self.processor = processor
        self.max_length = max_length
        images = processor.image_processor
        if images is not None and max_tiles is not None:
            tiling = images.tiling
            least = min(tiling.min_tiles, max_tiles)
            images = replace(images, tiling=replace(tiling, min_tiles=least, max_tiles=max_tiles))
        self.images: ImageProcessor | None = images

    def __call__(self, sample: Sample) -> Encoded:
        """Raises `DataError` that names the sample."""
        if sample.text is not None:
            ids = self.processor.text_ids(sample.text)
            return self._cut(Encoded(sample.name, ids, [False] + [True] * (len(ids) - 1)))
        try:
            num_tiles = tuple(self._count_tiles(image) for image in sample.images)
            ids, is_answer = self.processor.conversation_ids(sample.messages, num_tiles)
        except DataError as error:
            raise DataError(f"{sample.name}: {error.message}") from error
        return self._cut(Encoded(sample.name, ids, is_answer, sample.images, num_tiles))

    def _count_tiles(self, image: ImageSource) -> int:
        if self.images is None:
            raise DataError("the sample has an image, and the model reads text only")
        return count_tiles(*image_size(image), self.images.tiling)

    def _cut(self, sample: Encoded) -> Encoded:
        limit = self.max_length
        if len(sample) <= limit:
            return sample
        if sample.images:
            image_id = getattr(self.processor, "image_token_id", None)
            if image_id in sample.ids[limit:]:
                raise DataError(
                    f"{sample.name}: has {len(sample)} tokens, and cut to max_length = {limit} it "
                    "would lose part of an image"
                )
        return replace(sample, ids=sample.ids[:limit], is_answer=sample.is_answer[:limit])
