"""The walk of calibration samples through a teacher, and the start of each mixer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import Checkpoint
from mmmamba_cli.data import (
    BadSample,
    Fingerprint,
    StepLoader,
    check_bad_share,
    fingerprint,
    open_corpus,
)
from mmmamba_cli.errors import DataError, RecipeError
from mmmamba_cli.model import HolisticVLMConfig
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.decoder import HolisticDecoder
from mmmamba_cli.model.mixer import mixer_class
from mmmamba_cli.model.prepared_inputs import PreparedInputs, describe_tiles
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.recipe import Data, Recipe
from mmmamba_cli.runs import open_processor
from mmmamba_cli.seed.calibrated_start import FidelitySums, LayerStart, LayerSums, load_start
from mmmamba_cli.seed.fidelity import Calibration, fill_module

# Bounds the time and the memory of hidden states: 256 MiB for 2,048 channels in fp32.
MAX_CALIBRATION_COLUMNS = 32768
BATCH_SIZE = 4
# The last batch of so many measures the start and is not fitted.
BATCHES_PER_HELD_OUT = 5


@dataclass(frozen=True)
class CalibrationSamples:
    """Batches of the training data, the number of samples, and digests of all of the data."""

    batches: tuple[Calibration, ...]
    samples: int
    columns: int
    digests: Fingerprint

    @property
    def held_out(self) -> frozenset[int]:
        """The numbers of the batches that measure the start."""
        count = len(self.batches)
        chosen = range(BATCHES_PER_HELD_OUT - 1, count, BATCHES_PER_HELD_OUT)
        return frozenset(chosen) or frozenset((count - 1,))


@dataclass(frozen=True)
class CalibratedStart:
    """The starts of all layers, how well they fit, and what they were fitted on."""

    layers: tuple[LayerStart, ...]
    fidelity: tuple[dict[str, Any], ...]
    samples: CalibrationSamples

    def value(self, name: str) -> Tensor | None:
        """The value of a parameter by its name in the model; None if it is not calibrated."""
        place, _, part = name.partition(".mixer.")
        return self.layers[int(place.rpartition(".")[2])].value(part) if part else None

    @property
    def metrics(self) -> dict[str, Any]:
        """The manifest's metrics: sizes, and for each layer fidelity on the held-out samples."""
        counts = {"samples": self.samples.samples, "columns": self.samples.columns}
        return {"calibration": {**counts, "layers": list(self.fidelity)}}

    @property
    def note(self) -> str:
        def mean(field: str) -> float:
            return sum(row[field] for row in self.fidelity) / len(self.fidelity)

        return (
            f"calibrated on {self.samples.samples} samples ({self.samples.columns:,} columns); on "
            f"those held out, inherit+mimic: cosine {mean('cosine_mimic'):.2f}, relative MSE "
            f"{mean('relative_mse_mimic'):.2f}; calibrated: {mean('cosine'):.2f}, "
            f"{mean('relative_mse'):.2f}"
        )


def read_calibration_samples(teacher: Checkpoint, data: Data, seed: int) -> CalibrationSamples:
    """The first samples of `data.train` in the order of training with `seed`.

    Samples are read until they have `MAX_CALIBRATION_COLUMNS` columns.

    Raises:
        RecipeError: `data.train` is null.
        DataError: the teacher has no tokenizer, the data have too few samples, or more of them are
            unreadable than `data.max_bad_share` allows.
    """
    if data.train is None:
        raise RecipeError(
            "mixer.init is calibrated, which needs samples, and data.train is null",
            "give conversations with --set data.train=FILE, or use --init inherit+mimic",
        )
    processor = open_processor(teacher)
    if processor is None:
        raise DataError(f"{teacher.path} has no tokenizer for samples", "give --tokenizer FILE")
    seed = seed if data.shuffle_seed is None else data.shuffle_seed
    root = None if data.image_root is None else Path(data.image_root)
    corpus = open_corpus(data.train, root, seed=seed)
    loader = StepLoader(
        corpus,
        processor,
        batch_size=BATCH_SIZE,
        max_length=data.max_length,
        batching="bucketed",
        seed=seed,
        max_tiles=data.max_tiles,
        shuffle=data.shuffle,
        single_pass=True,
    )
    batches: list[Calibration] = []
    bad: list[BadSample] = []
    samples = columns = 0
    for step in range(loader.steps_per_pass):
        loaded = loader.step(step)
        bad += loaded.bad
        for micro in loaded.micro_batches:
            if micro.num_samples:
                # Pictures of a generated corpus are drawn here.
                batch = micro.to("cpu")
                mask = batch.attention_mask
                if mask is None:
                    mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
                batches.append(Calibration(batch.input_ids, mask, batch.pixel_values))
                samples, columns = samples + batch.num_samples, columns + batch.num_tokens
        if columns >= MAX_CALIBRATION_COLUMNS:
            break
    named = [f"{sample.name}: {sample.reason}" for sample in bad]
    check_bad_share(len(bad), samples + len(bad), data.max_bad_share, named)
    if len(batches) < 2:
        raise DataError(
            f"{data.train} has {samples} samples that can be read, calibration needs at least "
            f"{BATCH_SIZE + 1}",
            "check the data with `mmmamba data check`, or give other conversations",
        )
    return CalibrationSamples(tuple(batches), samples, columns, fingerprint(corpus))


@torch.no_grad()
def calibrate(
    teacher: Checkpoint,
    config: HolisticVLMConfig,
    recipe: Recipe,
    read: Callable[[str], Tensor],
) -> CalibratedStart:
    """Fit the start of every mixer in fp32, with one layer of the teacher in memory at a time.

    `config` is the student's, and `read` returns a tensor of the student with `inherit+mimic`.
    """
    samples = read_calibration_samples(teacher, recipe.data, recipe.seed)
    with torch.device("meta"):
        decoder = HolisticDecoder(teacher.config)
    fill_module(decoder, teacher.read, "model.", skip="layers.")
    prompts = [
        describe_tiles(config, decoder.prepare(one.input_ids, one.pixel_values, one.attention_mask))
        for one in samples.batches
    ]
    hidden = [decoder.embed(prompt) for prompt in prompts]
    starts, fidelity = [], []
    for layer in range(teacher.config.num_hidden_layers):
        if layer == decoder.num_embedding_layers:
            for i, prompt in enumerate(prompts):
                if prompt.embedding_layout is not None:
                    hidden[i] = decoder.embedding_to_language(hidden[i], prompt)
        with torch.device("meta"):
            block = Block(teacher.config, layer)
            mixer = mixer_class(config.mixer_names[layer])(config, layer)
        fill_module(block, teacher.read, f"model.layers.{layer}.")
        fill_module(mixer, read, f"model.layers.{layer}.mixer.")
        layouts = [_layout(decoder, prompt, layer) for prompt in prompts]
        start, row = _calibrate_layer(layer, block, mixer, hidden, layouts, samples.held_out)
        starts.append(start)
        fidelity.append(row)
        for i, columns in enumerate(layouts):
            hidden[i] = block(hidden[i], columns)
    return CalibratedStart(tuple(starts), tuple(fidelity), samples)


def _layout(decoder: HolisticDecoder, prompt: PreparedInputs, layer: int) -> SequenceLayout:
    if layer < decoder.num_embedding_layers and prompt.embedding_layout is not None:
        return prompt.embedding_layout
    return prompt.language_layout


def _calibrate_layer(
    layer: int,
    block: Block,
    mixer: Any,
    hidden: Sequence[Tensor],
    layouts: Sequence[SequenceLayout],
    held_out: frozenset[int],
) -> tuple[LayerStart, dict[str, Any]]:
    """The start of a layer, and its fidelity before and after on the held-out batches."""
    before, after = FidelitySums(), FidelitySums()
    measured: list[tuple[Tensor, Tensor, SequenceLayout]] = []
    for i in sorted(held_out):
        normed = block.mixer_norm(hidden[i])
        expected = block.mixer.mix(normed, layouts[i])
        measured.append((normed, expected, layouts[i]))
        before.add(mixer.mix(normed, layouts[i]), expected, layouts[i].mask, mixer.head_dim)
    sums = LayerSums(mixer, hidden[0].shape[-1])
    for i, columns in enumerate(layouts):
        if i not in held_out:
            normed = block.mixer_norm(hidden[i])
            sums.add(normed, columns, block.mixer.mix(normed, columns))
    start = sums.solve(layer, longest=max(one.shape[1] for one in hidden))
    load_start(mixer, start)
    for normed, expected, columns in measured:
        after.add(mixer.mix(normed, columns), expected, columns.mask, mixer.head_dim)
    row = {
        "layer": layer,
        "cosine_mimic": round(before.cosine, 4),
        "relative_mse_mimic": round(before.relative_mse, 4),
        "cosine": round(after.cosine, 4),
        "relative_mse": round(after.relative_mse, 4),
        "half_lives": list(start.half_lives),
    }
    return start, row
