"""Training of the small teacher: prompts equal the processor's, branches equal single ones, and a
resumed training gives the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mmmamba_cli
from mmmamba_cli.processing.chat_template import place_images
from mmmamba_cli.processing.processor_loader import processor_from_folder
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.batch_renderer import SceneEncoder
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_inputs import draw_text
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.world import World

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "teacher"))
import vocabulary
from architecture import random_teacher, teacher_config
from batches import Batcher
from hovle_teacher import HovleTeacher
from learning import answer_logits, tiles_and_thumbnail, uses_branches
from prompts import HovlePrompts
from saving import write_teacher
from train import Steps, inputs_of, parse, pictures_of, train


@pytest.fixture(scope="module")
def teacher(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained teacher and a small tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    original, vocabulary.LESSONS = vocabulary.LESSONS, 400
    try:
        model = vocabulary.train_tokenizer(vocabulary.corpus(world, 0))
    finally:
        vocabulary.LESSONS = original
    special = vocabulary.write_tokenizer(folder, model)
    raw = teacher_config(special, max(special.values()) + 1)
    write_teacher(folder, raw, random_teacher(raw, 0))
    return folder


@pytest.fixture(scope="module")
def batcher(teacher: Path, atlas: Atlas, world: World) -> Batcher:
    special = json.loads((teacher / "added_tokens.json").read_text())
    model = (teacher / "tokenizer.model").read_bytes()
    return Batcher(HovlePrompts(model, special), SceneEncoder(atlas, world), world, 0)


def whole(
    batcher: Batcher, prefix: list[int], one: Question, after_text: bool = False
) -> list[int]:
    return prefix + batcher.prompts.branch(one, after_text)[0]


def test_teacher_size(teacher: Path) -> None:
    model = mmmamba_cli.load(teacher)
    assert sum(p.numel() for p in model.parameters()) < 8_000_000
    assert sum(file.stat().st_size for file in teacher.iterdir()) <= 16 * 2**20
    assert processor_from_folder(teacher).tokens_per_tile == 64
    assert model.config.num_embedding_layers > 0
    assert model.config.embedding.num_kv_heads < model.config.embedding.num_heads


def test_prompts_equal_those_of_the_processor(
    teacher: Path, batcher: Batcher, world: World
) -> None:
    processor = processor_from_folder(teacher)
    rng = Random(0)
    for _ in range(20):
        for one in draw_lesson(rng, world)[1]:
            answer = {"role": "assistant", "content": one.answer}
            for pictures, tiles in ((1, 1), (1, 5), (3, 1)):
                text = place_images(one.text, pictures)
                shown = place_images("", pictures).removesuffix("\n")
                ids, marks = processor.conversation_ids(
                    [{"role": "user", "content": text}, answer], [tiles] * pictures
                )
                assert whole(batcher, batcher.prompts.prefix(shown, tiles), one) == ids
                assert sum(marks) == batcher.prompts.branch(one, False)[1]
        text, (one, _), _ = draw_text(rng, world, 3)
        conversation = [
            {"role": "user", "content": f"{text}\n{one.text}"},
            {"role": "assistant", "content": one.answer},
        ]
        ids = whole(batcher, batcher.prompts.text_prefix(text), one, after_text=True)
        assert ids == processor.conversation_ids(conversation)[0]


def test_branch_equals_branch_alone(teacher: Path, batcher: Batcher, world: World) -> None:
    model = mmmamba_cli.load(teacher, dtype="fp32")
    lessons = batcher.lessons(0, 2)
    assert uses_branches(lessons)
    pictures = pictures_of(HovleTeacher(), batcher.layouter, "cpu")
    pixels = pictures(lessons, None, None)
    assert pixels is not None
    with torch.no_grad():
        found = answer_logits(model, **inputs_of(lessons, torch.device("cpu")), pixels=pixels)
    rng = Random("0 lesson 0")
    prefix = batcher.prompts.prefix("<image>", 1)
    compared = 0
    for row in range(2):
        taken = 0
        for one in draw_lesson(rng, world)[1]:
            words, answered = batcher.prompts.branch(one, False)
            if taken + answered > len(lessons.targets[row]) or lessons.category[row, taken] < 0:
                break
            ids = torch.tensor([prefix + words])
            with torch.no_grad():
                alone = model(ids, pixel_values=pixels[row : row + 1]).logits[0]
            expected = alone[len(ids[0]) - answered - 1 : -1]
            assert torch.allclose(found[row, taken : taken + answered], expected, atol=2e-3)
            assert lessons.targets[row, taken : taken + answered].tolist() == words[-answered:]
            taken += answered
            compared += 1
    assert compared >= 8


def test_tiles_equal_those_of_the_processor(teacher: Path) -> None:
    from PIL import Image

    from mmmamba_cli.processing.tiling import cut_tiles

    processor = processor_from_folder(teacher)
    rng = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 14, 21, generator=rng), (448, 672), mode="bicubic"
    ).clamp(0, 1)
    ours = tiles_and_thumbnail(smooth, (3, 2))
    pixels = (smooth[0].permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    tiles = cut_tiles(Image.fromarray(pixels), processor.image_processor.tiling)
    assert len(tiles) == len(ours) == 7
    for tile, mine in zip(tiles, ours, strict=True):
        theirs = torch.from_numpy(np.array(tile)).permute(2, 0, 1) / 255
        assert (theirs - mine).abs().max() < 0.02


def test_every_kind_of_step_has_answers(batcher: Batcher) -> None:
    steps = Steps(batcher, HovleTeacher.kinds, 200, 16)
    kinds: dict[str, Any] = {}
    for step in range(100, 160):
        kinds.setdefault(steps[step].kind, steps[step])
    assert set(kinds) == {"lesson", "large", "many", "text"}
    for lessons in kinds.values():
        assert (lessons.targets >= 0).any(1).all()
        assert (lessons.weights > 0).sum() == (lessons.targets >= 0).sum()
        prompts = batcher.prompts
        assert lessons.ids.max() < len(prompts.special) + prompts.pieces.get_piece_size()


def test_resumed_training_equals_uninterrupted(teacher: Path, tmp_path: Path) -> None:
    def run(out: Path, every: int, stop_after: int | None = None) -> Path:
        given = parse(
            f"--out {out} --steps 2 --pictures 2 --lr 1e-3 --seed 3 --workers 0 --every {every} "
            "--device cpu --held-out 2".split()
        )
        (out / "teacher").mkdir(parents=True, exist_ok=True)
        (out / "teacher" / "tokenizer.model").write_bytes(
            (teacher / "tokenizer.model").read_bytes()
        )
        if stop_after is None:
            train(given)
        else:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Steps, "__getitem__", stopping(stop_after))
                train(given)
        return out / "teacher" / "model.safetensors"

    def stopping(at: int) -> Any:
        original = Steps.__getitem__

        def get(self: Steps, step: int) -> Any:
            if step == at:
                raise KeyboardInterrupt
            return original(self, step)

        return get

    once = load_file(run(tmp_path / "once", every=2))
    run(tmp_path / "twice", every=1, stop_after=1)
    again = load_file(run(tmp_path / "twice", every=1))
    assert set(once) == set(again)
    assert all(torch.equal(once[name], again[name]) for name in once)
