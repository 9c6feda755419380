"""A micro batch as text, answers apart: what a model reads, and what it learns to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from mmmamba_cli.data.batch import IGNORE_INDEX, Batch
from mmmamba_cli.data.model_batch import ModelBatch

# A token that follows itself this often is written once, with its number: the tokens of a picture.
MIN_REPEATS = 4


@dataclass(frozen=True)
class TextRun:
    """Neighbouring tokens as text; `is_answer` if they have labels."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class RowText:
    """A row of a micro batch: its text in runs, and its numbers of tokens without padding."""

    runs: tuple[TextRun, ...]
    num_tokens: int
    num_answer_tokens: int

    def marked(self, opening: str = "⟦", closing: str = "⟧") -> str:
        """The text with answers between two marks."""
        return "".join(
            f"{opening}{run.text}{closing}" if run.is_answer else run.text for run in self.runs
        )


def rows_as_text(batch: Batch | ModelBatch, tokenizer: Any) -> list[RowText]:
    """The rows of a micro batch as text, special tokens included.

    `tokenizer` is that of transformers that made the ids (`processor.tokenizer`). A token that
    repeats, as those of a picture do, is written as `<|image_pad|>x256`.
    """
    ids = batch.inputs["input_ids"] if isinstance(batch, ModelBatch) else batch.input_ids
    return [
        _row_text(ids[row][mask], batch.labels[row][mask], tokenizer)
        for row, mask in enumerate(batch.token_mask)
    ]


def _row_text(ids: Tensor, labels: Tensor, tokenizer: Any) -> RowText:
    is_answer = (labels != IGNORE_INDEX).tolist()
    runs = []
    for answers, pairs in groupby(zip(ids.tolist(), is_answer, strict=True), lambda one: one[1]):
        runs.append(TextRun(_text([token for token, _ in pairs], tokenizer), answers))
    return RowText(tuple(runs), len(is_answer), sum(is_answer))


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ids, with repeated tokens as their number."""
    pieces: list[str] = []
    waiting: list[int] = []
    for token, same in groupby(ids):
        count = len(list(same))
        if count < MIN_REPEATS:
            waiting += [token] * count
            continue
        pieces += [_decode(waiting, tokenizer), f"{_decode([token], tokenizer)}x{count}"]
        waiting = []
    return "".join([*pieces, _decode(waiting, tokenizer)])


def _decode(ids: list[int], tokenizer: Any) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
