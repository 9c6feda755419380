"""Teacher, student and batches of Qwen3-VL with random weights, in memory, for benchmarks.

Weights are made on the device within seconds. A row has four pictures, which are half of its
tokens, each before a text, as a processor of the family lays them out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from qwen3_vl_needs import ANSWERS, SIZES
from random_stages import SEED, accumulation_of, micro_batch_rows
from seed_in_place import TEXT, VISION
from transformers.initialization import no_init_weights

from mmmamba_cli.data import IGNORE_INDEX, ModelBatch, StepBatches
from mmmamba_cli.data.holistic_collator import assign_rows
from mmmamba_cli.distill.in_place_pair import InPlacePair, check_head, replace_parameters
from mmmamba_cli.distill.micro_batches import stage_accumulation
from mmmamba_cli.distill.model_pair import ModelPair
from mmmamba_cli.distill.parallelize import ParallelPlan, parallelize
from mmmamba_cli.distill.stage_memory import MicroBatchSize, StageMemory, estimate_memory
from mmmamba_cli.distill.stage_shapes import StageShapes, in_place_shapes, trained_before
from mmmamba_cli.distill.trainable import attach_lora
from mmmamba_cli.distill.trainer import TrainingJob
from mmmamba_cli.distill.training_state import StateFolder
from mmmamba_cli.distributed import World
from mmmamba_cli.recipe import Recipe, Stage, load_recipe, place_attention
from mmmamba_cli.teachers import StudentPlan, convert, mixer_in_place, student_config

RECIPE = "qwen3-vl-hybrid"
PICTURES = 4
# Attention stays in one of this many text layers, as in the recipe.
LAYERS_PER_ATTENTION = 4
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
TINY_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
# The last ids of a small vocabulary.
TINY_TOKENS = {
    "image_token_id": 508,
    "video_token_id": 509,
    "vision_start_token_id": 510,
    "vision_end_token_id": 511,
}


# Initial values of a mixer's parameter by its name, the same in all layers: drawing them takes
# longer than anything else that prepares a stage.
_initial_value = functools.cache(mixer_in_place.new_value)


@dataclass(frozen=True)
class QwenSetup:
    """A stage of a Qwen3-VL of `size` ("2B", "4B", "8B") to train for a few steps.

    A step has `rows` rows, `micro_rows` of them in a micro batch, a number or "auto". `changes` are
    of the recipe's stage. With `packed` each picture and its text are a conversation of the row.
    """

    size: str
    stage: str
    changes: dict[str, Any]
    rows: int
    micro_rows: int | str
    length: int
    steps: int
    folder: Path
    tiny: bool = False
    packed: bool = False


def teacher_config(size: str, tiny: bool) -> Any:
    """The config of Qwen3-VL of 2, 4 or 8 B parameters, or of a model of four small layers."""
    text, vision = SIZES[size]
    text, vision = TEXT | text | (TINY_TEXT if tiny else {}), VISION | vision
    return transformers.Qwen3VLConfig(
        text_config=text,
        vision_config=vision | (TINY_VISION if tiny else {}),
        tie_word_embeddings=text["tie_word_embeddings"],
        **(TINY_TOKENS if tiny else {}),
    )


def random_teacher(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A teacher with random weights: norms near one, matrices small enough for finite losses."""
    with no_init_weights(), device:
        teacher = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.normal_(std=0.02)
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    return teacher.requires_grad_(False).eval()


def make_pair(teacher: Any, shapes: StageShapes, stage: Stage) -> ModelPair:
    """The pair of a stage, as `load_in_place_pair` makes it: frozen tensors are the teacher's."""
    trainable, adapted = shapes.trainable(stage)
    masters = set(trainable) - set(adapted)
    with mock.patch.object(mixer_in_place, "new_value", _value_of_first_layer):
        student = convert(teacher, StudentPlan.from_json(shapes.config.mmmamba))
    learning: dict[Any, Any] = {}
    for name, parameter in student.named_parameters():
        if name in masters:
            learning[parameter] = torch.nn.Parameter(parameter.detach().clone().float())
    student.requires_grad_(False)
    replace_parameters(student, lambda _, parameter: learning.get(parameter, parameter))
    pair = InPlacePair(teacher, student.eval(), stage.precision).with_trainable(masters)
    check_head(pair)
    return pair if stage.lora is None else attach_lora(pair, stage.lora, adapted)


def _value_of_first_layer(
    mixer: str, layer: int, name: str, shape: tuple[int, ...], mimic: bool, seed: int
) -> torch.Tensor:
    return _initial_value(mixer, 0, name, shape, mimic, seed)


def make_job(setup: QwenSetup, world: World) -> tuple[TrainingJob, StageMemory]:
    """The job of a stage of the recipe on this process, and the estimate of its memory."""
    recipe = load_recipe(RECIPE)
    stage = _stage(recipe, setup, world)
    config = teacher_config(setup.size, setup.tiny)
    layers = config.text_config.num_hidden_layers
    shapes = in_place_shapes(student_config(config, StudentPlan.of_layers(layers)))
    if stage.layers == "planned":
        kept = place_attention(recipe.layers.placement, layers // LAYERS_PER_ATTENTION, layers)
        shapes = shapes.with_attention(kept)
    trainable, _ = shapes.trainable(stage)
    before = trained_before(recipe, recipe.stages[_index(recipe, setup.stage)], shapes)
    answers = min(ANSWERS, setup.length // (2 * PICTURES))
    loader = BatchesInMemory(config, setup, stage, answers, world.device)
    rows = max(micro_batch_rows(loader.step(0)))
    size = MicroBatchSize(rows, setup.length, rows * answers)
    memory = estimate_memory(shapes, stage, size, before)
    torch.manual_seed(SEED)
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    teacher = random_teacher(config, world.device, dtype)
    pair = make_pair(teacher, shapes, stage)
    objective = shapes.objective(stage, trainable)
    job = TrainingJob(
        stage=stage,
        pair=pair,
        objective=objective,
        gradients=parallelize(pair, objective, ParallelPlan("replicate"), world),
        loader=loader,  # type: ignore[arg-type]
        held_out=None,
        max_bad_share=0.0,
        seed=SEED,
        world=world,
        states=StateFolder(setup.folder, world),
        settings={"stage": stage.model_dump(mode="json"), "data": {}},
    )
    return job, memory


def _index(recipe: Recipe, name: str) -> int:
    return [stage.name for stage in recipe.stages].index(name)


def _stage(recipe: Recipe, setup: QwenSetup, world: World) -> Stage:
    """The recipe's stage with the steps and rows of `setup`."""
    changes: dict[str, Any] = {
        "steps": setup.steps,
        "batch_size": setup.rows,
        "accumulation": accumulation_of(setup.rows, setup.micro_rows, 1),
        "max_length": setup.length,
        "evaluate_every": None,
        "save_every": None,
        **setup.changes,
    }
    if world.device.type == "cpu":
        changes["precision"] = "fp32"
    values = recipe.stages[_index(recipe, setup.stage)].model_dump()
    return Stage.model_validate({**values, **changes})


class BatchesInMemory:
    """A `StepLoader` of the same rows in each step, made beforehand: nothing waits for data."""

    def __init__(
        self, config: Any, setup: QwenSetup, stage: Stage, answers: int, device: torch.device
    ):
        rng = torch.Generator().manual_seed(SEED)
        self._num_samples = setup.rows * (PICTURES if setup.packed else 1)
        # The loader divides the rows of a step by their lengths.
        lengths = [[range(setup.length)] for _ in range(setup.rows)]
        parts = assign_rows(lengths, 0, 1, stage_accumulation(stage))
        micros = (
            join_rows([make_row(config, setup.length, answers, rng, setup.packed) for _ in part])
            for part in parts
        )
        is_gpu = device.type == "cuda"
        self._micros = tuple(micro.pin_memory() if is_gpu else micro for micro in micros)

    def step(self, step: int) -> StepBatches:
        """The batches of one step."""
        return StepBatches(step, self._micros, (), self._num_samples)

    def steps(self, first: int, stop: int) -> Iterator[StepBatches]:
        """The batches of steps `first` to `stop` - 1."""
        yield from map(self.step, range(first, stop))


def join_rows(rows: Sequence[ModelBatch]) -> ModelBatch:
    """A micro batch of rows of equal length, with their pictures in order."""
    return ModelBatch(
        {name: torch.cat([row.inputs[name] for row in rows]) for name in rows[0].inputs},
        torch.cat([row.labels for row in rows]),
        num_samples=sum(row.num_samples for row in rows),
        num_tokens=sum(row.num_tokens for row in rows),
        names=tuple(name for row in rows for name in row.names),
        seq_idx=(
            None
            if rows[0].seq_idx is None
            else torch.cat([row.seq_idx for row in rows if row.seq_idx is not None])
        ),
    )


def make_row(
    config: Any, length: int, answers: int, rng: torch.Generator, packed: bool = False
) -> ModelBatch:
    """One row of `length` tokens: pictures, each before a text that ends with answer tokens.

    `answers` are those of the row. The row is one conversation, or with `packed` one for each
    picture.
    """
    vision, text = config.vision_config, config.text_config
    side = math.isqrt(length // (2 * PICTURES))
    shown, part = side**2, length // PICTURES
    special = [config.image_token_id, config.vision_start_token_id, config.vision_end_token_id]
    words = torch.randint(min(special) // 2, (PICTURES, part), generator=rng)
    words[:, 0], words[:, 1 : shown + 1], words[:, shown + 1] = special[1], special[0], special[2]
    ids = torch.cat((words.flatten(), torch.randint(8, (length % PICTURES,), generator=rng)))[None]
    is_answer = torch.zeros(PICTURES, part, dtype=torch.bool)
    is_answer[:, part - answers // PICTURES :] = True
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, : PICTURES * part] = words.masked_fill(~is_answer, IGNORE_INDEX).flatten()
    grid = torch.tensor([[1, side * vision.spatial_merge_size, side * vision.spatial_merge_size]])
    patches = PICTURES * int(grid.prod())
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(patches, pixels, generator=rng),
        "image_grid_thw": grid.expand(PICTURES, -1).contiguous(),
    }
    assert text.vocab_size > max(special)
    # Tokens behind the last picture's part belong to its conversation.
    seq_idx = (torch.arange(length) // part).clamp(max=PICTURES - 1)[None] if packed else None
    count = PICTURES if packed else 1
    return ModelBatch(inputs, labels, count, length, names=("random",) * count, seq_idx=seq_idx)
