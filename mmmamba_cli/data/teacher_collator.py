"""Micro batches through a teacher's own processor.

Planning a global batch renders and tokenizes texts, and counts the tokens of pictures by their
sizes. Only the rows of a process go through the processor, one micro batch in one call, so that
padding and the shapes of pictures are the family's own. Conversations of packed rows are joined
behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmmamba_cli.data.batch import IGNORE_INDEX, BadSample, bad_sample
from mmmamba_cli.data.drawn_pictures import draw_pictures
from mmmamba_cli.data.generated_corpus import SampleGenerator
from mmmamba_cli.data.model_batch import ModelBatch, pack_conversations
from mmmamba_cli.data.sample import Drawing, Picture, Sample, Video, read_image
from mmmamba_cli.data.sample_size import SampleSize
from mmmamba_cli.data.video import load_frames
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import (
    RenderedPrompt,
    TeacherProcessor,
    VideoFrames,
    image_size,
    open_image,
)

# A batch for a process without rows; any text has a first token.
EMPTY_TEXT = "a"


@dataclass(frozen=True)
class Media:
    """The decoded pictures and videos of a sample."""

    images: list[Image.Image]
    videos: list[VideoFrames]


@dataclass(frozen=True)
class EncodedPrompt:
    """A sample as a rendered prompt, with its length as the processor will make it.

    Attributes:
        name: of the sample.
        prompt: text, tokens and answers before pictures take their places.
        images, videos: its pictures and videos, not decoded.
        length: tokens after truncation, those of pictures included.
        cut: tokens that are truncated.
    """

    name: str
    prompt: RenderedPrompt
    images: tuple[Picture, ...] = ()
    videos: tuple[Video, ...] = ()
    length: int = 0
    cut: int = 0

    # The processor has its own units of pictures.
    num_tiles: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.length

    @property
    def num_answer_tokens(self) -> int:
        # Only tokens behind the last picture are truncated.
        return sum(self.prompt.is_answer[: len(self.prompt.is_answer) - self.cut])


class TeacherCollator:
    """Encodes samples by a teacher's processor, and makes micro batches of them."""

    def __init__(
        self,
        processor: TeacherProcessor,
        max_length: int,
        generator: SampleGenerator | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        self._generator = generator

    def encode(self, sample: Sample) -> EncodedPrompt:
        """Render a sample and count its tokens. Raises `DataError` that names the sample."""
        try:
            return self._encode(sample)
        except DataError as error:
            raise DataError(f"{sample.name}: {error.message}", error.hint) from error

    def measure(self, sample: Sample) -> SampleSize:
        """Sizes before truncation. Raises the errors of `encode`, but for those of truncation."""
        try:
            return self._rendered(sample)[1]
        except DataError as error:
            raise DataError(f"{sample.name}: {error.message}", error.hint) from error

    def decode(self, sample: EncodedPrompt) -> None:
        """Process a sample as training does. Raises `DataError` if that fails."""
        self._process([sample], [self._media(sample)])

    def collate(
        self, rows: Sequence[Sequence[EncodedPrompt]]
    ) -> tuple[ModelBatch, list[BadSample]]:
        """One micro batch of rows of samples, without those that cannot be processed."""
        bad: list[BadSample] = []
        kept: list[EncodedPrompt] = []
        media: list[Media] = []
        for sample in (one for row in rows for one in row):
            try:
                media.append(self._media(sample))
                kept.append(sample)
            except DataError as error:
                bad.append(bad_sample(error, sample.name, seen_by_all=False))
        try:
            batch = self._process(kept, media)
        except DataError:
            good, unusable = self._usable(kept, media)
            if not unusable:
                raise
            batch = self._process(*good)
            kept, bad = good[0], bad + unusable
        return self._packed(batch, rows, kept), bad

    def _packed(
        self,
        batch: ModelBatch,
        rows: Sequence[Sequence[EncodedPrompt]],
        kept: Sequence[EncodedPrompt],
    ) -> ModelBatch:
        """The batch of the samples `kept`, with those of a row in one row."""
        numbers = {id(sample): number for number, sample in enumerate(kept)}
        members = [[numbers[id(one)] for one in row if id(one) in numbers] for row in rows]
        members = [row for row in members if row]
        if all(len(row) == 1 for row in members):
            return batch
        return pack_conversations(batch, members, self.processor.tokenizer.pad_token_id)

    def _encode(self, sample: Sample) -> EncodedPrompt:
        prompt, size = self._rendered(sample)
        kept = size.truncated(self.max_length)
        cut = size.tokens - kept
        return EncodedPrompt(sample.name, prompt, sample.images, sample.videos, kept, cut)

    def _rendered(self, sample: Sample) -> tuple[RenderedPrompt, SampleSize]:
        if sample.text is not None:
            prompt = self.processor.render_text(sample.text)
        else:
            prompt = self.processor.render(sample.messages, len(sample.images), len(sample.videos))
        # A video is decoded to be counted: its header does not tell which frames are sampled.
        videos = [self._frames(video) for video in sample.videos]
        length = self.processor.length(prompt, [_size(image) for image in sample.images], videos)
        required = length - prompt.tail if sample.images or videos else 0
        return prompt, SampleSize(length, required, len(sample.images))

    def _media(self, sample: EncodedPrompt) -> Media:
        """Decode the pictures and videos of a sample. Raises `DataError`."""
        return Media(self._pictures(sample), [self._frames(video) for video in sample.videos])

    def _frames(self, video: Video) -> VideoFrames:
        return load_frames(video, self.processor.decode_clip)

    def _pictures(self, sample: EncodedPrompt) -> list[Image.Image]:
        drawings = [image for image in sample.images if isinstance(image, Drawing)]
        if drawings:
            assert self._generator is not None
            return draw_pictures(self._generator, drawings)
        return [
            open_image(read_image(image), label=f"image {number}", upright=True)
            for number, image in enumerate(sample.images, start=1)
            if not isinstance(image, Drawing)
        ]

    def _usable(
        self, samples: Sequence[EncodedPrompt], media: Sequence[Media]
    ) -> tuple[tuple[list[EncodedPrompt], list[Media]], list[BadSample]]:
        """The samples that can be processed alone, and the others with the reason."""
        kept: list[EncodedPrompt] = []
        shown: list[Media] = []
        bad = []
        for sample, decoded in zip(samples, media, strict=True):
            try:
                self._process([sample], [decoded])
            except DataError as error:
                bad.append(bad_sample(error, sample.name, seen_by_all=False))
            else:
                kept.append(sample)
                shown.append(decoded)
        return (kept, shown), bad

    def _process(self, samples: Sequence[EncodedPrompt], media: Sequence[Media]) -> ModelBatch:
        if not samples:
            return self._empty()
        made = self.processor.inputs(
            [sample.prompt.text for sample in samples],
            [decoded.images for decoded in media],
            [decoded.videos for decoded in media],
        )
        ids, mask = made["input_ids"], made["attention_mask"]
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, sample in enumerate(samples):
            length = int(mask[row].sum())
            is_answer = torch.tensor(
                self.processor.answers(sample.prompt, ids[row, :length].tolist())
            )
            labels[row, :length] = ids[row, :length].masked_fill(~is_answer, IGNORE_INDEX)
        shape = ids.shape
        inputs = {name: self._truncate(value, shape) for name, value in made.items()}
        return ModelBatch(
            inputs=inputs,
            labels=labels[:, : self.max_length],
            num_samples=len(samples),
            num_tokens=int(inputs["attention_mask"].sum()),
            names=tuple(sample.name for sample in samples),
        )

    def _truncate(self, value: Tensor, shape: torch.Size) -> Tensor:
        """Cut an input with a value for each token to the maximum length."""
        per_token = value.ndim == 2 and value.shape == shape
        return value[:, : self.max_length] if per_token else value

    def _empty(self) -> ModelBatch:
        """One token that counts nothing, for a process without rows: it takes part in collectives.

        Its inputs are those of a batch of texts.
        """
        made = self.processor.inputs([EMPTY_TEXT], [[]])
        inputs = {name: value[:, :1] for name, value in made.items()}
        labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        return ModelBatch(inputs=inputs, labels=labels, num_samples=0, num_tokens=0)


def _size(image: Picture) -> tuple[int, int]:
    """Width and height of a picture, from its header."""
    if isinstance(image, Drawing):
        return image.width, image.height
    return image_size(read_image(image), upright=True)
