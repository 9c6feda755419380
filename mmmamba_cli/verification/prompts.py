"""Prompts of a verification: words and drawn pictures, as inputs of a model.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mmmamba_cli.processing import HolisticTextProcessor, HolisticVLMProcessor

QUESTION = "What does the picture show? Name its colours."
LONGER_QUESTION = "Count the words of this sentence, then name the largest of its letters, please."
CHINESE_QUESTION = "请描述红色。"
# (width, height) in pixels. A square picture is one tile, which keeps prompts short.
PICTURE_SIZES = ((224, 224), (160, 288))
# Random ids of a prompt without tokenizer, and the lengths of its rows.
RANDOM_LENGTHS = (12, 19, 7)


@dataclass(frozen=True)
class Row:
    """The question of one user message and its pictures, which come first."""

    words: str
    pictures: tuple[Image.Image, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation, as processors of transformers take it."""
        items: list[dict[str, Any]] = [
            {"type": "image", "image": picture} for picture in self.pictures
        ]
        return [{"role": "user", "content": [*items, {"type": "text", "text": self.words}]}]


Inputs = dict[str, Tensor]
# Inputs of a model, padded on the left, for rows.
Encode = Callable[[Sequence[Row]], Inputs]


@dataclass(frozen=True)
class Prompts:
    """Inputs of the comparisons.

    Attributes:
        text: a question, B = 1.
        picture: a question about one picture, B = 1; None if pictures cannot be encoded.
        pictures: a question about two pictures of unequal size, B = 1; None likewise.
        batch: three rows of different lengths, padded on the left; None if they cannot be padded.
        rows: the rows of `batch`, each alone.
        origin: what made them, for details of results.
    """

    text: Inputs
    picture: Inputs | None
    pictures: Inputs | None
    batch: Inputs | None
    rows: tuple[Inputs, ...]
    origin: str

    @property
    def richest(self) -> Inputs:
        """The prompt with a picture if there is one, else the text."""
        return self.text if self.picture is None else self.picture


def drawn_picture(index: int = 0) -> Image.Image:
    """A gradient with shapes in plain colours, of the size `PICTURE_SIZES[index]`."""
    width, height = PICTURE_SIZES[index]
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    colour = ((200, 40, 40), (30, 90, 200))[index]
    draw.rectangle((width // 8, height // 8, width // 2, height // 2), fill=colour)
    draw.ellipse((width // 2, height // 2, width - 10, height - 10), fill=(40, 160, 70))
    return picture


def text_rows() -> list[Row]:
    return [Row(QUESTION), Row(LONGER_QUESTION), Row(CHINESE_QUESTION)]


def picture_rows() -> list[Row]:
    """Rows with one picture, with two of unequal size, and with none."""
    first, second = drawn_picture(0), drawn_picture(1)
    return [Row(QUESTION, (first,)), Row(LONGER_QUESTION, (first, second)), Row(CHINESE_QUESTION)]


def random_rows(vocab_size: int, avoided: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Rows of random ids without those of special tokens, for a teacher without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(vocab_size)
    allowed[[index for index in avoided if 0 <= index < vocab_size]] = 0
    return [
        torch.multinomial(allowed, length, replacement=True, generator=generator).tolist()
        for length in RANDOM_LENGTHS
    ]


def padded_left(rows: Sequence[Sequence[int]], pad_id: int) -> Inputs:
    """`input_ids` and `attention_mask` (B, T), int64, of rows of ids."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def random_prompts(vocab_size: int, avoided: Sequence[int], pad_id: int | None) -> Prompts:
    """Prompts of random ids; padding is any id, since the mask hides it."""
    rows = random_rows(vocab_size, avoided)
    padding = pad_id if pad_id is not None and 0 <= pad_id < vocab_size else 0
    alone = tuple(padded_left([row], padding) for row in rows)
    return Prompts(
        alone[0], None, None, padded_left(rows, padding), alone, "random ids, without a tokenizer"
    )


def encoded_prompts(encode: Encode, has_pictures: bool, origin: str) -> Prompts:
    """Prompts that a tokenizer or processor encodes."""
    rows = picture_rows() if has_pictures else text_rows()
    alone = tuple(encode([row]) for row in rows)
    return Prompts(
        text=encode(text_rows()[:1]),
        picture=alone[0] if has_pictures else None,
        pictures=alone[1] if has_pictures else None,
        batch=encode(rows),
        rows=alone,
        origin=origin,
    )


def holistic_encoder(processor: HolisticVLMProcessor | HolisticTextProcessor) -> Encode:
    """The encoder of a `HolisticVLM` processor."""

    def encode(rows: Sequence[Row]) -> Inputs:
        if isinstance(processor, HolisticTextProcessor):
            if processor.tokenizer.chat_template is None:
                return dict(processor(text=[row.words for row in rows], padding=True))
            return dict(processor.chat([row.words for row in rows], padding=True))
        pictures = [list(row.pictures) for row in rows]
        return dict(processor.chat([row.words for row in rows], pictures, padding=True))

    return encode


def to_model(inputs: Mapping[str, Any], model: Any) -> Inputs:
    """The inputs on the model's device, pixels in its dtype."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            kind = model.dtype if value.is_floating_point() else value.dtype
            found[name] = value.to(model.device, kind)
    return found
