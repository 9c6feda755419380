"""Encoding of samples to token ids; tile counts come from image headers, without decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mmmamba_cli.data.sample import Drawing, Picture, Sample, read_image
from mmmamba_cli.data.sample_size import SampleSize
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import (
    HolisticVLMProcessor,
    ImageProcessor,
    TrainingProcessor,
    count_tiles,
    image_size,
)


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of a sample; `is_answer` marks answer tokens, `cut` counts truncated tokens."""

    name: str
    ids: list[int]
    is_answer: list[bool]
    images: tuple[Picture, ...] = ()
    num_tiles: tuple[int, ...] = ()
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_answer_tokens(self) -> int:
        return sum(self.is_answer)

    @property
    def drawings(self) -> list[Drawing]:
        """The pictures that are drawn on the device of training."""
        return [image for image in self.images if isinstance(image, Drawing)]


class SampleEncoder:
    """Encodes samples for one model, truncated to `max_length` tokens."""

    def __init__(self, processor: TrainingProcessor, max_length: int, max_tiles: int | None):
        self.processor = processor
        self.max_length = max_length
        images = processor.image_processor
        if images is not None and max_tiles is not None:
            images = images.with_tile_limits(min(images.min_tiles, max_tiles), max_tiles)
        self.images: ImageProcessor | None = images

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encode a sample. Raises `DataError` that names the sample."""
        try:
            return self._truncate(self._encode(sample))
        except DataError as error:
            raise DataError(f"{sample.name}: {error.message}") from error

    def measure(self, sample: Sample) -> SampleSize:
        """Sizes before truncation. Raises the errors of `__call__`, but for those of truncation."""
        try:
            if sample.text is None and isinstance(self.processor, HolisticVLMProcessor):
                num_tiles = self._num_tiles(sample)
                tokens, required = self.processor.conversation_length(sample.messages, num_tiles)
                return SampleSize(tokens, required, len(num_tiles), sum(num_tiles))
            return self._size(self._encode(sample))
        except DataError as error:
            raise DataError(f"{sample.name}: {error.message}") from error

    def _encode(self, sample: Sample) -> EncodedSample:
        num_tiles = self._num_tiles(sample)
        if sample.text is not None:
            ids = self.processor.text_ids(sample.text)
            if not ids:
                raise DataError("the text has no tokens")
            return EncodedSample(sample.name, ids, [False] + [True] * (len(ids) - 1))
        ids, is_answer = self.processor.conversation_ids(sample.messages, num_tiles)
        return EncodedSample(sample.name, ids, is_answer, sample.images, num_tiles)

    def _num_tiles(self, sample: Sample) -> tuple[int, ...]:
        if sample.videos:
            raise DataError("the sample has a video, and the model reads text and images only")
        return tuple(self._count_tiles(image) for image in sample.images)

    def _count_tiles(self, image: Picture) -> int:
        if self.images is None:
            raise DataError("the sample has an image, and the model reads text only")
        if isinstance(image, Drawing):
            return count_tiles(image.width, image.height, self.images.tiling)
        return count_tiles(*image_size(read_image(image)), self.images.tiling)

    def _truncate(self, sample: EncodedSample) -> EncodedSample:
        limit = self.max_length
        if len(sample) <= limit:
            return sample
        kept = self._size(sample).truncated(limit)
        ids, is_answer = sample.ids[:kept], sample.is_answer[:kept]
        return replace(sample, ids=ids, is_answer=is_answer, cut=len(sample) - kept)

    def _size(self, sample: EncodedSample) -> SampleSize:
        """Sizes of a sample that is not truncated."""
        required = 0
        if sample.images:
            image_id = getattr(self.processor, "image_token_id", None)
            places = (i for i in range(len(sample) - 1, -1, -1) if sample.ids[i] == image_id)
            required = next(places, -1) + 1
        return SampleSize(len(sample), required, len(sample.images), sum(sample.num_tiles))


def decode_images(sample: EncodedSample, images: ImageProcessor | None) -> list[Tensor]:
    """Decode a sample's pictures: a list of one uint8 (N, 3, S, S) tensor, empty without pictures.

    Empty for pictures that are drawn later.

    Raises:
        DataError: a picture cannot be decoded.
    """
    files = [image for image in sample.images if not isinstance(image, Drawing)]
    if not files or images is None:
        return []
    pixels, num_tiles = images.tile_uint8([read_image(image) for image in files])
    if tuple(num_tiles) != sample.num_tiles:
        raise DataError(f"its images have {num_tiles} tiles, their headers said otherwise")
    return [pixels]
