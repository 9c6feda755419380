"""The small teacher of class Idefics3: prompts equal the processor's, logits equal the class's."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from mmmamba_evals import model_folders
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.batch_renderer import SceneEncoder
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_inputs import draw_text
from mmmamba_evals.scenes.world import World

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "teacher"))
import vocabulary
from batches import Batcher
from prompts import SmolvlmPrompts
from smolvlm_teacher import SmolvlmTeacher, train_bpe, write_processor
from train import build_optimiser, inputs_of, learn, pictures_of


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A processor with a small tokenizer."""
    folder = tmp_path_factory.mktemp("smolvlm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "LESSONS", 300)
        write_processor(folder, train_bpe(vocabulary.corpus(world, 0)))
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return transformers.Idefics3Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> SmolvlmPrompts:
    return SmolvlmPrompts((folder / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def batcher(prompts: SmolvlmPrompts, atlas: Atlas, world: World) -> Batcher:
    return Batcher(prompts, SceneEncoder(atlas, world), world, 0)


def conversation(pictures: int, question: str, answer: str) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [
        {"type": "image", "image": Image.new("RGB", (224, 224), (200, 30 * n, 90))}
        for n in range(pictures)
    ]
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def encoded(processor: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def test_prompts_equal_those_of_the_processor(
    processor: Any, prompts: SmolvlmPrompts, world: World
) -> None:
    rng = Random(0)
    end = processor.tokenizer.encode("\n", add_special_tokens=False)
    for one in draw_lesson(rng, world)[1]:
        asked, answered = prompts.branch(one, False)
        for pictures in (1, 3):
            messages = conversation(pictures, one.text, one.answer)
            ids = [*prompts.prefix("<image>" * pictures, 1), *asked]
            assert encoded(processor, messages)["input_ids"][0].tolist() == ids + end
            before = encoded(processor, messages[:1], add_generation_prompt=True)["input_ids"][0]
            assert before.tolist() == ids[: len(ids) - answered]
    text, (one, _), _ = draw_text(rng, world, 3)
    ids = [*prompts.text_prefix(text), *prompts.branch(one, True)[0]]
    messages = conversation(0, f"{text}\n{one.text}", one.answer)
    assert encoded(processor, messages)["input_ids"][0].tolist() == ids + end


def test_logits_equal_those_of_the_class_for_each_branch(
    processor: Any, prompts: SmolvlmPrompts, batcher: Batcher, world: World
) -> None:
    teacher = SmolvlmTeacher()
    model = teacher.model(prompts, Namespace(seed=0, begin=None)).eval()
    lessons = batcher.lessons(0, 2)
    pixels = pictures_of(teacher, batcher.layouter, "cpu")(lessons, None, None)
    assert pixels is not None
    with torch.no_grad():
        found = teacher.logits(model, **inputs_of(lessons, torch.device("cpu")), pixels=pixels)
    rng = Random("0 lesson 0")
    compared = 0
    for row in range(2):
        taken = 0
        for one in draw_lesson(rng, world)[1][:4]:
            asked, answered = prompts.branch(one, False)
            ids = torch.tensor([[*prompts.prefix("<image>", 1), *asked]])
            with torch.no_grad():
                alone = model(input_ids=ids, pixel_values=pixels[row][None, None]).logits[0]
            expected = alone[ids.shape[1] - answered - 1 : -1]
            assert torch.allclose(found[row, taken : taken + answered], expected, atol=1e-3)
            taken += answered
            compared += 1
    assert compared == 8


def test_text_layers_of_a_hovle_teacher_and_a_tower_that_learns_first(
    prompts: SmolvlmPrompts, batcher: Batcher
) -> None:
    teacher, begin = SmolvlmTeacher(), model_folders()["scenes-teacher"]
    model = teacher.model(prompts, Namespace(seed=0, begin=begin))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = build_optimiser(model, 1e-3)
    lessons = batcher.lessons(1, 2)
    pixels = pictures_of(teacher, batcher.layouter, "cpu")(lessons, None, None)
    first = learn(teacher, model, optimiser, 0, lessons, pixels)["loss"]
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all(".vision_model." in name or ".connector." in name for name in changed)
    for _ in range(4):
        last = learn(teacher, model, optimiser, 0, lessons, pixels)["loss"]
    assert last < first
    learn(teacher, model, optimiser, 10_000, lessons, pixels)
    name = "model.text_model.layers.0.self_attn.q_proj.weight"
    assert not model.state_dict()[name].equal(before[name])
