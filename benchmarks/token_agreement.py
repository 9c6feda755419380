"""Token agreement of students with their teacher in the answers of lessons.

Two metrics per answer token, teacher-forced: whether the student's most likely token is the
teacher's, and the shared probability mass, 1 minus the total variation distance of both
distributions. Legend: M students, C comparisons, N places that predict a token of
an answer, L lessons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import Checkpoint, load_model
from mmmamba_cli.data import IGNORE_INDEX, Batch, open_corpus
from mmmamba_cli.data.holistic_collator import collate
from mmmamba_cli.data.sample_encoder import SampleEncoder
from mmmamba_cli.distill.kl_loss import shift_labels
from mmmamba_cli.errors import RunError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.prepared_inputs import describe_tiles
from mmmamba_cli.runs import open_processor

# (title, metric) by file name; the report sorts by file name.
COMPARISONS = {
    "agreement": (
        "Next tokens of answers on held-out lessons, which no student learned from",
        "most likely token equal to the teacher's, %",
    ),
    "overlap": (
        "Shared probability of the same tokens",
        "probability that student and teacher share, %",
    ),
}
# Conversations per batch, and the largest number of tokens of one.
TOGETHER, MAX_LENGTH = 8, 1024

# (sum of the metric, number of tokens) per lesson.
Shares = list[tuple[float, int]]


@torch.no_grad()
def by_lesson(
    teacher: Checkpoint, students: Mapping[str, Checkpoint], lessons: Path
) -> dict[str, dict[str, Shares]]:
    """Shares by comparison and student. A lesson has all questions about one picture.

    `lessons` is what `mmmamba scenes build` calls `lessons.jsonl`.
    """
    processor = open_processor(teacher)
    if processor is None:
        raise RunError(f"{teacher.path} has no tokenizer")
    opened = [teacher, *students.values()]
    models = [load_model(one.path, dtype="fp32", frozen=True, checkpoint=one) for one in opened]
    encoder = SampleEncoder(processor, MAX_LENGTH, max_tiles=1)
    corpus = open_corpus(lessons)
    owners = lesson_numbers(lessons)
    right = torch.zeros(len(students), len(COMPARISONS), int(owners.max()) + 1).double()
    tokens = torch.zeros(right.shape[-1], dtype=torch.int64)
    for owner, numbers in zip(
        owners.split(TOGETHER), torch.arange(len(owners)).split(TOGETHER), strict=True
    ):
        rows = [[encoder(corpus[number])] for number in numbers.tolist()]
        batch, bad = collate(rows, encoder.images, processor.pad_token_id)
        if bad:
            raise RunError(f"{lessons}: {bad[0].name}: {bad[0].reason}")
        found, row = compare(models, batch)
        right.index_add_(2, owner[row], found)
        tokens += torch.bincount(owner[row], minlength=len(tokens))
    return {
        label: {
            name: list(zip(right[m, c].tolist(), tokens.tolist(), strict=True))
            for c, name in enumerate(COMPARISONS)
        }
        for m, label in enumerate(students)
    }


def read_conversations(teacher: Checkpoint, lessons: Path, number: int) -> Batch:
    """The first `number` conversations of lessons as one padded batch."""
    processor = open_processor(teacher)
    if processor is None:
        raise RunError(f"{teacher.path} has no tokenizer")
    encoder = SampleEncoder(processor, MAX_LENGTH, max_tiles=1)
    corpus = open_corpus(lessons)
    rows = [[encoder(corpus[i])] for i in range(min(number, len(corpus)))]
    batch, bad = collate(rows, encoder.images, processor.pad_token_id)
    if bad:
        raise RunError(f"{lessons}: {bad[0].name}: {bad[0].reason}")
    return batch.to("cpu")


def lesson_numbers(lessons: Path) -> Tensor:
    """The lesson of each line, numbered from 0 in order of appearance."""
    lines = lessons.read_text(encoding="utf-8").splitlines()
    # `scene-17-4` is a conversation of lesson 17.
    names = [json.loads(line)["id"].rpartition("-")[0] for line in lines]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def compare(models: Sequence[HolisticVLM], batch: Batch) -> tuple[Tensor, Tensor]:
    """Metrics (M, C, N) of each model after the first, which is the teacher, and the row of each
    position (N,).
    """
    scored = shift_labels(batch) != IGNORE_INDEX
    prompt = models[0].model.prepare(
        batch.input_ids, batch.pixel_values, batch.attention_mask, batch.seq_idx
    )
    taught, *learned = (
        model.lm_head(model.model.forward_prepared(describe_tiles(model.config, prompt))[scored])
        .double()
        .softmax(-1)
        for model in models
    )
    found = {
        "agreement": [(one.argmax(-1) == taught.argmax(-1)).double() for one in learned],
        "overlap": [torch.minimum(one, taught).sum(-1) for one in learned],
    }
    together = torch.stack([torch.stack(found[name]) for name in COMPARISONS], 1)
    return together, scored.nonzero()[:, 0]
