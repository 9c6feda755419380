"""Collators: samples to micro batches, by the processor of the model that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mmmamba_cli.data.batch import BadSample
from mmmamba_cli.data.corpus import Corpus
from mmmamba_cli.data.generated_corpus import GeneratedCorpus
from mmmamba_cli.data.holistic_collator import HolisticCollator
from mmmamba_cli.data.sample import Picture, Sample
from mmmamba_cli.data.sample_size import SampleSize
from mmmamba_cli.data.teacher_collator import TeacherCollator
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor


class Encoded(Protocol):
    """An encoded sample; its length is that of its tokens, at most the maximum."""

    @property
    def name(self) -> str: ...

    @property
    def images(self) -> tuple[Picture, ...]: ...

    @property
    def num_tiles(self) -> tuple[int, ...]:
        """Tiles of each picture; empty where the model's processor does not count tiles."""
        ...

    @property
    def num_answer_tokens(self) -> int: ...

    @property
    def cut(self) -> int:
        """Number of truncated tokens."""
        ...

    def __len__(self) -> int: ...


class Collator(Protocol):
    """Encodes samples and makes micro batches of them."""

    max_length: int

    def encode(self, sample: Sample) -> Any:
        """Encode a sample, reading headers of pictures only. Raises `DataError` that names it."""
        ...

    def measure(self, sample: Sample) -> SampleSize:
        """Sizes before truncation, for a data index. Raises the errors of `encode`.

        Truncation, which depends on the maximum length, is left to `SampleSize.truncated`.
        """
        ...

    def decode(self, sample: Any) -> None:
        """Decode or draw the pictures of a sample. Raises `DataError` if that fails."""
        ...

    def collate(self, rows: Sequence[Any]) -> tuple[Any, list[BadSample]]:
        """One micro batch of rows of encoded samples, without those that cannot be used."""
        ...


def make_collator(
    corpus: Corpus,
    processor: TrainingProcessor | TeacherProcessor,
    max_length: int,
    max_tiles: int | None = None,
) -> Collator:
    """The collator of a processor, whose batches are `ModelBatch`es for a `TeacherProcessor`.

    Raises:
        DataError: `max_tiles` for a processor that sets the resolution itself.
    """
    generator = corpus.generator if isinstance(corpus, GeneratedCorpus) else None
    if not isinstance(processor, TeacherProcessor):
        return HolisticCollator(processor, max_length, max_tiles, generator)
    if max_tiles is not None:
        raise DataError(
            f"data.max_tiles (--max-tiles) is {max_tiles}, and the teacher's own processor sets "
            "the resolution",
            "leave it out",
        )
    return TeacherCollator(processor, max_length, generator)
