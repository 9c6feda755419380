"""Single layers of the shipped teacher as several mixers: the loss on scenes after equal steps.

    python benchmarks/mixers_on_scenes.py [--variants mamba2 mamba2:conv_width=9 ...]
        [--layers 0 1] [--steps 150] [--pictures 480] [--seed 0] [--device cpu] [--out FILE]

A variant is KIND[:OPTION=VALUE,...] with the options of the recipe's section `mixer`. One layer of
scenes-teacher becomes the variant's mixer, seeded as by `mmmamba seed`; all other layers are the
teacher's. It learns as in stage 2 of the recipe scenes-linear, in batches of padded conversations
about one picture each: AdamW on the mean squared error before W_O, everything but W_O learns. All
variants see the same batches in the same order. Prints one JSON object: 1,000 times the error over
held-out pictures, over image columns and over text columns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import load_model, open_checkpoint
from mmmamba_cli.data import open_corpus
from mmmamba_cli.data.holistic_collator import collate
from mmmamba_cli.data.sample_encoder import SampleEncoder
from mmmamba_cli.distill.optimiser import build_optimiser, clip_gradients, learning_rate
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.errors import RunError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.mixer import mixer_class
from mmmamba_cli.model.prepared_inputs import describe_tiles
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.recipe import Recipe, load_recipe
from mmmamba_cli.runs import open_processor
from mmmamba_cli.runs.manifest import package_versions
from mmmamba_cli.seed import initial_value
from mmmamba_cli.seed.weight_transfer import student_config
from mmmamba_evals.scenes.fonts import SEEN, fonts_of
from mmmamba_evals.scenes.scene_writers import LESSONS, write_lessons
from mmmamba_evals.scenes.shipped import shipped_atlas
from mmmamba_evals.scenes.world import make_world

TEACHER, RECIPE, STAGE = "scenes-teacher", "scenes-linear", "stage2"
VARIANTS = (
    "mamba2",
    "mamba2:conv_width=9",
    "mamba2:tile_taps=true",
    "gated_delta",
    "gated_delta:tile_taps=true",
    "kda",
    "window:window=64,sinks=4",
)
BATCH, MAX_LENGTH = 8, 1024
SCALE = 1000


@dataclass(frozen=True)
class LayerBatch:
    """What one layer of the teacher reads and computes for a batch."""

    normed: Tensor  # (B, T, D), input of the mixer
    expected: Tensor  # (B, T, H * P), the teacher's output before W_O
    layout: SequenceLayout
    is_image: Tensor  # (B, T) bool
    is_real: Tensor  # (B, T) bool, False at padding


def draw(folder: Path, pictures: int, seed: int) -> tuple[Path, list[int]]:
    """Lessons about `pictures` pictures: their file, and one conversation of each by its index."""
    atlas = shipped_atlas()
    folder.mkdir()
    write_lessons(folder, atlas, make_world(atlas, fonts_of(SEEN)), seed, pictures, short=True)
    lines = (folder / LESSONS).read_text(encoding="utf-8").splitlines()
    # `scene-17-4` is a conversation of lesson 17.
    owners = [json.loads(line)["id"].rpartition("-")[0] for line in lines]
    return folder / LESSONS, [owners.index(owner) for owner in dict.fromkeys(owners)]


@torch.no_grad()
def layer_batches(
    model: HolisticVLM, lessons: Path, samples: Sequence[int], layers: Sequence[int], device: str
) -> dict[int, list[LayerBatch]]:
    """Batches of each of `layers`, computed by the teacher."""
    processor = open_processor(open_checkpoint(TEACHER))
    assert processor is not None, "the shipped teacher has a tokenizer"
    encoder, corpus = SampleEncoder(processor, MAX_LENGTH, max_tiles=1), open_corpus(lessons)
    decoder = model.model
    tiles = student_config(model.config, recipe_of("mamba2:tile_taps=true,tile_layers=all", 1))
    found: dict[int, list[LayerBatch]] = {layer: [] for layer in layers}
    for first in range(0, len(samples), BATCH):
        rows = [[encoder(corpus[number])] for number in samples[first : first + BATCH]]
        batch, bad = collate(rows, encoder.images, processor.pad_token_id)
        if bad:
            raise RunError(f"{lessons}: {bad[0].name}: {bad[0].reason}")
        batch = batch.to(device)
        ids, mask = batch.input_ids, batch.attention_mask
        prompt = describe_tiles(tiles, decoder.prepare(ids, batch.pixel_values, mask))
        assert prompt.is_image is not None and prompt.expansion is None
        is_real = torch.ones_like(prompt.is_image) if mask is None else mask
        hidden, layout = decoder.embed(prompt), prompt.embedding_layout
        for index, block in enumerate(decoder.blocks[: max(layers) + 1]):
            if index == decoder.num_embedding_layers:
                hidden = decoder.embedding_to_language(hidden, prompt)
                layout = prompt.language_layout
            assert layout is not None
            normed = block.mixer_norm(hidden)
            mixed = block.mixer.mix(normed, layout)
            if index in found:
                found[index].append(LayerBatch(normed, mixed, layout, prompt.is_image, is_real))
            hidden = block.after_mixer(hidden, block.mixer.o_proj(mixed))
    return found


def recipe_of(variant: str, steps: int) -> Recipe:
    """The recipe whose students have the mixer `variant` in all layers."""
    kind, _, options = variant.partition(":")
    sets = [f"mixer.{option}" for option in options.split(",") if option]
    return load_recipe(RECIPE, [f"mixer.kind={kind}", *sets, f"stages.{STAGE}.steps={steps}"])


def seeded_mixer(model: HolisticVLM, recipe: Recipe, layer: int, seed: int) -> Any:
    """The mixer of a layer of a student, with the teacher's weights and initial values."""
    config = student_config(model.config, recipe)
    name, prefix = config.mixer_names[layer], f"model.layers.{layer}.mixer."
    mixer: nn.Module = mixer_class(name)(config, layer)
    given, shapes = dict(model.named_parameters()), parameter_shapes(config)
    with torch.no_grad():
        for inner, parameter in mixer.named_parameters():
            whole = prefix + inner
            value = given.get(whole)
            if value is None:
                value = initial_value(whole, shapes[whole], name, recipe.mixer.init, seed)
            parameter.copy_(value)
    return mixer


def errors(mixer: Any, batches: Sequence[LayerBatch]) -> dict[str, float]:
    """1,000 times the mean squared error before W_O, over image columns and over text columns."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    with torch.no_grad():
        for one in batches:
            squares = (mixer.mix(one.normed, one.layout) - one.expected).square().mean(-1)
            for part, columns in enumerate((one.is_image, one.is_real & ~one.is_image)):
                sums[part] += squares[columns].double().sum().cpu()
                counts[part] += columns.sum().cpu()
    image, text = (SCALE * sums / counts).tolist()
    return {"image": round(image, 2), "text": round(text, 2)}


def learn(mixer: Any, recipe: Recipe, model: HolisticVLM, layer: int, batches: list[Any]) -> None:
    """Train a mixer on the batches, in turn, as stage 2 does."""
    stage = next(stage for stage in recipe.stages if stage.name == STAGE)
    config, prefix = student_config(model.config, recipe), f"model.layers.{layer}.mixer."
    learns = trainable_names(stage, config, list(parameter_shapes(config)))
    parameters = {name: p for name, p in mixer.named_parameters() if prefix + name in learns}
    optimiser = build_optimiser(stage, parameters)
    for step in range(stage.steps):
        one = batches[step % len(batches)]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, step)
        difference = mixer.mix(one.normed, one.layout) - one.expected
        loss = SCALE * difference.square().mean(-1)[one.is_real].mean()
        optimiser.zero_grad()
        loss.backward()
        clip_gradients(parameters, stage.optimiser.clip)
        optimiser.step()


def measure(given: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each layer and variant."""
    model = load_model(TEACHER, device=given.device, dtype="fp32", frozen=True)
    held_out = max(BATCH, given.pictures // 6)
    train, test = (
        layer_batches(
            model, *draw(folder / name, count, seed), layers=given.layers, device=given.device
        )
        # Held-out pictures are drawn from another seed.
        for name, count, seed in (
            ("train", given.pictures, given.seed),
            ("held-out", held_out, given.seed + 1_000_003),
        )
    )
    for layer in given.layers:
        for variant in given.variants:
            began, recipe = time.process_time(), recipe_of(variant, given.steps)
            mixer = seeded_mixer(model, recipe, layer, given.seed).to(given.device)
            before = errors(mixer, test[layer])
            learn(mixer, recipe, model, layer, train[layer])
            row = {
                "layer": layer,
                "mixer": variant,
                "parameters": sum(p.numel() for p in mixer.parameters()),
                "seeded": before,
                "learned": errors(mixer, test[layer]),
                "cpu_seconds": round(time.process_time() - began, 1),
            }
            print(json.dumps(row), file=sys.stderr)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pictures", type=int, default=480, help="a sixth more are held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    load, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(given, Path(folder)))
    is_cuda = torch.device(given.device).type == "cuda"
    found = {
        "what": "1,000 x mean squared error before W_O of single layers of scenes-teacher, over "
        "held-out pictures, after equal steps of stage 2 of scenes-linear",
        "command": " ".join(["python benchmarks/mixers_on_scenes.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if is_cuda else "CPU",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load average before and after": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": round(time.perf_counter() - began),
        "versions": package_versions(),
        "seed": given.seed,
        "steps": given.steps,
        "pictures": given.pictures,
        "pictures a step": BATCH,
        "rows": rows,
    }
    printed = json.dumps(found, indent=2)
    print(printed)
    if given.out is not None:
        given.out.write_text(printed + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
