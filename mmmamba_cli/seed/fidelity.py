"""Fidelity of each seeded mixer to the teacher's attention, before training.

Calibration inputs are built in, or read from a JSON Lines file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mmmamba_cli.checkpoint import Checkpoint, stored_dtype
from mmmamba_cli.errors import DataError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.decoder import HolisticDecoder
from mmmamba_cli.model.mixer import mixer_class
from mmmamba_cli.model.prepared_inputs import describe_tiles
from mmmamba_cli.processing import HolisticTextProcessor, HolisticVLMProcessor

QUESTIONS = (
    "How many shapes are in the picture, and which of them is red?",
    "Describe the picture from left to right, naming every shape and its colour.",
)
TEXTS = (
    "How many shapes are on the table, and which of them is red? Two are: a square and a circle.",
    "Describe the way from the station to the market, naming every street and what is sold there.",
)
NUM_RANDOM_TOKENS = 48

Processor = HolisticVLMProcessor | HolisticTextProcessor


@dataclass(frozen=True)
class Calibration:
    """Model inputs: ids and mask (B, T), pixels (tiles, 3, S, S) or None."""

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None


def built_in_calibration(config: HolisticVLMConfig, processor: Processor | None) -> Calibration:
    """Two questions about a drawing, or two texts; random ids without a processor."""
    if processor is None:
        return _without_tokenizer(config)
    if config.vision is None:
        return _encode(processor, [(text, []) for text in TEXTS])
    return _encode(processor, [(question, [calibration_drawing()]) for question in QUESTIONS])


def read_calibration(file: Path, processor: Processor | None) -> Calibration:
    """Read a JSON Lines file of {"question": text, "image": path relative to the file (optional)}.

    Raises `DataError` that names the line.
    """
    if processor is None:
        raise DataError(f"{file} needs a tokenizer to be read", "give --tokenizer FILE")
    return _encode(processor, read_samples(file))


def read_samples(file: Path) -> list[tuple[str, list[Image.Image | Path]]]:
    """The questions of a JSON Lines file, each with its pictures; see `read_calibration`."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text", "check --calibration") from error
    samples = [_sample(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise DataError(f"{file} is empty", 'expected lines like {"question": "..."}')
    return samples


def _sample(file: Path, number: int, line: str) -> tuple[str, list[Image.Image | Path]]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number} is not JSON: {error}") from error
    question = value.get("question") if isinstance(value, dict) else None
    if not isinstance(question, str):
        raise DataError(f"{file}, line {number} has no question", "expected {'question': text}")
    image = value.get("image")
    if image is None:
        return question, []
    picture = file.parent / str(image)
    if not picture.is_file():
        raise DataError(f"{file}, line {number}: the picture {picture} does not exist")
    return question, [picture]


def _encode(
    processor: Processor, samples: list[tuple[str, list[Image.Image | Path]]]
) -> Calibration:
    if isinstance(processor, HolisticTextProcessor):
        if any(images for _, images in samples):
            raise DataError("the calibration has images, and the model reads text only")
        texts = [text for text, _ in samples]
        if processor.tokenizer.chat_template is None:
            batch = processor(text=texts)
        else:
            batch = processor.chat(texts)
        return Calibration(batch["input_ids"], batch["attention_mask"], None)
    talks = [question_message(text, len(images)) for text, images in samples]
    batch = processor.chat(talks, [images for _, images in samples], max_tiles=1)
    return Calibration(batch["input_ids"], batch["attention_mask"], batch.get("pixel_values"))


def question_message(text: str, num_images: int) -> list[dict[str, Any]]:
    """One user message; the text is a separate part, so that `<image>` in it stays text."""
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _without_tokenizer(config: HolisticVLMConfig) -> Calibration:
    rng = torch.Generator().manual_seed(0)
    vision = config.vision_config
    high = config.vocab_size if vision is None else min(config.vocab_size, vision.image_token_id)
    ids = torch.randint(0, high, (1, NUM_RANDOM_TOKENS), generator=rng)
    pixels = None
    if vision is not None:
        pixels = torch.randn(
            1, vision.num_channels, vision.image_size, vision.image_size, generator=rng
        )
        image = torch.full((1, vision.tokens_per_tile), vision.image_token_id)
        ids = torch.cat((ids[:, :8], image, ids[:, 8:]), dim=1)
    return Calibration(ids, torch.ones_like(ids), pixels)


def calibration_drawing() -> Image.Image:
    """A drawing of three coloured shapes, 448 pixels wide and high."""
    picture = Image.new("RGB", (448, 448), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((40, 60, 180, 200), fill="red")
    draw.ellipse((230, 90, 400, 260), fill="blue")
    draw.polygon(((120, 400), (220, 250), (320, 400)), fill="green")
    return picture


@dataclass(frozen=True)
class LayerFidelity:
    """Student and teacher mixer outputs before W_O, compared on the teacher's hidden states.

    `cosine` is the mean over tokens and heads; `relative_mse` is |s - t|^2 / |t|^2.
    """

    layer: int
    cosine: float
    relative_mse: float


@torch.no_grad()
def measure_fidelity(
    teacher: Checkpoint,
    student: Checkpoint,
    calibration: Calibration,
    advance: Callable[[int], None] | None = None,
) -> list[LayerFidelity]:
    """Compare layer by layer in fp32, with one layer of each model in memory at a time."""
    with torch.device("meta"):
        decoder = HolisticDecoder(teacher.config)
    fill_module(decoder, teacher.read, "model.", skip="layers.")
    mask = calibration.attention_mask
    prompt = decoder.prepare(calibration.input_ids, calibration.pixel_values, mask)
    prompt = describe_tiles(student.config, prompt)
    hidden, columns = decoder.embed(prompt), prompt.embedding_layout or prompt.language_layout
    results = []
    for layer in range(teacher.config.num_hidden_layers):
        if layer == decoder.num_embedding_layers:
            hidden = (
                decoder.embedding_to_language(hidden, prompt)
                if prompt.embedding_layout is not None
                else hidden
            )
            columns = prompt.language_layout
        with torch.device("meta"):
            block = Block(teacher.config, layer)
            mixer = mixer_class(student.config.mixer_names[layer])(student.config, layer)
        fill_module(block, teacher.read, f"model.layers.{layer}.")
        fill_module(mixer, student.read, f"model.layers.{layer}.mixer.")
        normed = block.mixer_norm(hidden)
        expected, actual = block.mixer.mix(normed, columns), mixer.mix(normed, columns)
        results.append(_compare(layer, expected, actual, columns.mask, mixer.head_dim))
        hidden = block(hidden, columns)
        if advance is not None:
            advance(1)
    return results


def fill_module(
    module: nn.Module, read: Callable[[str], Tensor], prefix: str, skip: str | None = None
) -> None:
    """Give a module on the meta device its tensors, `prefix` before their names, in fp32."""
    names = [n for n in module.state_dict() if skip is None or not n.startswith(skip)]
    state = {n: read(prefix + n).to(stored_dtype(n, torch.float32)) for n in names}
    module.load_state_dict(state, strict=skip is None, assign=True)


def _compare(
    layer: int, expected: Tensor, actual: Tensor, mask: Tensor | None, head_dim: int
) -> LayerFidelity:
    if mask is not None:
        expected, actual = expected[mask], actual[mask]
    expected, actual = expected.reshape(-1, head_dim), actual.reshape(-1, head_dim)
    cosine = torch.nn.functional.cosine_similarity(actual, expected, dim=-1).mean()
    relative = (actual - expected).square().sum() / expected.square().sum()
    values = float(cosine), float(relative)
    if not all(math.isfinite(value) for value in values):
        raise ArithmeticError(f"layer {layer}: fidelity is {values}")
    return LayerFidelity(layer, *values)
