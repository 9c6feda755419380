"""Training step of the small teacher: pictures, branches, and the loss on the answers.

Legend: B rows, T columns, A answer tokens a row, N tiles a row, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from batches import IGNORED, LARGE, LESSON, Lessons
from torch import Tensor

from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.rope import inverse_frequencies, rope_cos_sin
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_evals.scenes.augmentation import Augmentation
from mmmamba_evals.scenes.batch_renderer import BatchRenderer
from mmmamba_evals.scenes.composition import SIDE


@dataclass(frozen=True)
class Branched(SequenceLayout):
    """Columns that attend causally to their own branch and to the trunk, branch 0."""

    branch: Tensor | None = None

    def attention_mask(self, num_keys: int) -> Tensor | None:
        assert self.branch is not None
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        order = torch.arange(num_keys, device=key.device)
        allowed = (order[None, :] <= order[:, None]) & ((key == 0) | (key == query))
        return allowed.unsqueeze(1)

    def is_plain_causal(self, num_keys: int) -> bool:
        return self.branch is None


def answer_logits(
    model: HolisticVLM, ids: Tensor, positions: Tensor, branch: Tensor | None, columns: Tensor,
    pixels: Tensor | None,
) -> Tensor:  # fmt: skip
    """Logits (B, A, V) at `columns`.

    `pixels` (B * N, 3, S, S) is normalised. Attention is plain causal if `branch` is None.
    """
    decoder = model.model
    hidden = decoder.text_embedding(ids)
    if pixels is not None:
        hidden = _with_images(model, hidden, ids, pixels)
    # No operation between the stacks: the pixel shuffle precedes both.
    split = decoder.num_embedding_layers
    for stack, blocks in (
        (model.config.embedding, decoder.blocks[:split]),
        (model.config.language, decoder.blocks[split:]),
    ):
        assert stack is not None
        frequencies = inverse_frequencies(stack, ids.shape[1], ids.device)
        seen = Branched(*rope_cos_sin(positions, frequencies, hidden.dtype), 0, branch=branch)
        for block in blocks:
            hidden = block(hidden, seen)
    hidden = decoder.norm(hidden)
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return model.lm_head(hidden[rows, columns])


def _with_images(model: HolisticVLM, hidden: Tensor, ids: Tensor, pixels: Tensor) -> Tensor:
    vision, config = model.model.vision, model.config.vision_config
    assert vision is not None
    assert config is not None
    images = vision.merge(vision(pixels)).reshape(len(ids), -1, hidden.shape[-1])
    is_image = ids == config.image_token_id
    # All rows have the same number of image tokens, so that all shapes are known.
    place = (is_image.long().cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return torch.where(is_image.unsqueeze(-1), images[rows, place].to(hidden.dtype), hidden)


def answer_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of the answer tokens."""
    each = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (each * weights.flatten()).sum() / weights.sum()


class Pictures:
    """Tiles of a batch's pictures on the device, cut and normalised as by the processor."""

    def __init__(self, composer: BatchRenderer, mean: Sequence[float], deviation: Sequence[float]):
        self.composer = composer
        self.mean = torch.tensor(mean, device=composer.device).view(3, 1, 1)
        self.deviation = torch.tensor(deviation, device=composer.device).view(3, 1, 1)

    def __call__(
        self, lessons: Lessons, how: Augmentation | None, generator: torch.Generator | None
    ) -> Tensor | None:
        if lessons.layouts is None:
            return None
        drawn = self.composer.draw(lessons.layouts, how, generator)
        if lessons.kind == LARGE and lessons.grid is not None:
            drawn = tiles_and_thumbnail(drawn, lessons.grid)
        return (drawn - self.mean) / self.deviation


def tiles_and_thumbnail(drawn: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 3, rows S, columns S) -> (B * (tiles + 1), 3, S, S), row by row, thumbnail last."""
    columns, rows = grid
    cut = drawn.view(len(drawn), 3, rows, SIDE, columns, SIDE).permute(0, 2, 4, 1, 3, 5)
    tiles = cut.reshape(len(drawn), rows * columns, 3, SIDE, SIDE)
    small = F.interpolate(drawn, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    return torch.cat((tiles, small.unsqueeze(1)), 1).flatten(0, 1)


def uses_branches(lessons: Lessons) -> bool:
    """Whether rows have several questions, which need an attention mask."""
    return lessons.kind == LESSON or int(lessons.branch.max()) > 1
