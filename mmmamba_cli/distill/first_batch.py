"""The first batch of a stage: its sizes, and what its rows say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmmamba_cli.data import IGNORE_INDEX, Batch, RowText, StepBatches, StepLoader, rows_as_text
from mmmamba_cli.distill.stage_memory import MicroBatchSize
from mmmamba_cli.errors import DataError
from mmmamba_cli.recipe import Stage


@dataclass(frozen=True)
class FirstBatch:
    """The first batch of a stage, on the first process.

    Attributes:
        samples, tokens, answer_tokens: of all its micro batches, without padding.
        rows: the rows of the first micro batch as text.
        bad: `name: reason` of samples that could not be read.
        micro_batches: their number.
        largest: size of its largest micro batch, with padding.
        batching: how its rows are made, `packed`, `bucketed` or `padded`.
    """

    samples: int
    tokens: int
    answer_tokens: int
    rows: tuple[RowText, ...]
    bad: tuple[str, ...]
    micro_batches: int
    largest: MicroBatchSize
    batching: str

    def at_length(self, length: int, rows: int) -> MicroBatchSize:
        """The size of a micro batch of `rows` rows of `length` columns."""
        columns = max(length, self.largest.columns)
        share = self.largest.scored / self.largest.tokens
        return MicroBatchSize(rows, columns, round(share * rows * columns))


def describe_first_batch(
    stage: Stage, loader: StepLoader, batches: StepBatches, tokenizer: Any, vision: Any
) -> FirstBatch:
    """Describe a batch.

    Args:
        loader: that read it.
        tokenizer: of transformers, that made its ids.
        vision: `vision_config` of a `HolisticVLM`; None for other models.

    Raises:
        DataError: none of its samples can be read, or none has a token that the loss scores.
    """
    bad = tuple(f"{sample.name}: {sample.reason}" for sample in batches.bad)
    micros = [micro for micro in batches.micro_batches if micro.num_samples]
    if not micros:
        raise DataError(
            f"stage {stage.name}: none of the {batches.num_planned} samples of the first batch "
            "could be read" + (f"; the first: {bad[0]}" if bad else ""),
            "see them all with `mmmamba data check --all`",
        )
    sizes = [_size(stage, micro, vision) for micro in micros]
    if not any(size.scored for size in sizes):
        raise DataError(
            f"stage {stage.name}: no sample of the first batch has a token that the loss scores",
            "give conversations with answers, or kl.mask: all",
        )
    return FirstBatch(
        samples=sum(micro.num_samples for micro in micros),
        tokens=sum(micro.num_tokens for micro in micros),
        answer_tokens=sum(int((micro.labels != IGNORE_INDEX).sum()) for micro in micros),
        rows=tuple(rows_as_text(micros[0], tokenizer)),
        bad=bad,
        micro_batches=len(batches.micro_batches),
        largest=max(sizes, key=lambda size: size.tokens),
        batching=loader.batching,
    )


def _size(stage: Stage, micro: Any, vision: Any) -> MicroBatchSize:
    rows, columns = micro.labels.shape
    answers_only = stage.kl is not None and stage.kl.mask == "answer"
    is_scored = micro.labels != IGNORE_INDEX if answers_only else micro.token_mask
    if isinstance(micro, Batch) and vision is not None and vision.pixel_shuffle == "post":
        # The embedding stack sees the patches of an image token.
        image_tokens = (micro.input_ids == vision.image_token_id).sum(1).max()
        columns += (vision.merge**2 - 1) * int(image_tokens)
    return MicroBatchSize(rows, columns, int(is_scored.sum()))
