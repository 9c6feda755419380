"""Writers of scenes: evaluation tables in VLMEvalKit's layout, and training conversations."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from mmmamba_cli.interrupts import block_interrupts
from mmmamba_cli.processing.chat_template import place_images
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.categories import SPLITS
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_inputs import draw_pictures, draw_text
from mmmamba_evals.scenes.renderer import render
from mmmamba_evals.scenes.sampling import (
    DRAWS,
    SceneQuestions,
    ask_about_objects,
    available_categories,
)
from mmmamba_evals.scenes.scene import Question, Scene
from mmmamba_evals.scenes.world import World

COLUMNS = ("index", "image", "image_path", "question", "answer", "category")
TABLE, LESSONS, PICTURES = "SCENES.tsv", "lessons.jsonl", "pictures"
# Pictures per split (six questions each) and per other category (two questions each).
PICTURES_OF_SPLIT, PICTURES_OF_PAIR = 40, 100
# Lessons per task of a worker process.
LESSONS_PER_TASK = 64
# Few questions per conversation, because later ones can be answered from earlier answers.
QUESTIONS_PER_CONVERSATION = 4
# Of LONG_EVERY lessons, one asks about several pictures and one about a long text.
LONG_EVERY = 12
MAX_PICTURES, MAX_SENTENCES = 12, 100

Say = Callable[[int], None]


def draw_suite(
    world: World, seed: int, of_split: int = PICTURES_OF_SPLIT, of_pair: int = PICTURES_OF_PAIR
) -> Iterator[tuple[str, SceneQuestions]]:
    """Yield (category, (scene, questions)) of a suite, deterministic in seed and world."""
    for split in SPLITS:
        for number in range(of_split):
            yield split, ask_about_objects(Random(f"{seed} {split} {number}"), world, split)
    for category in available_categories(world):
        for number in range(of_pair):
            yield category, DRAWS[category](Random(f"{seed} {category} {number}"), world)


def write_suite(
    file: Path,
    atlas: Atlas,
    world: World,
    seed: int,
    of_split: int = PICTURES_OF_SPLIT,
    of_pair: int = PICTURES_OF_PAIR,
    say: Say = lambda pictures: None,
) -> int:
    """Write the table of a suite and return its number of questions; `say(1)` per picture."""
    index = 0
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for number, (category, (scene, asked)) in enumerate(
            draw_suite(world, seed, of_split, of_pair)
        ):
            cell = encode(render(scene, atlas))
            path = f"{category}/{number}.png"
            write_questions(writer, index, cell, path, asked)
            index += len(asked)
            say(1)
    return index


def write_questions(
    writer: Any, first: int, cell: str, path: str, asked: Sequence[Question]
) -> None:
    """Write the rows of one picture: the first row holds it, the others refer to the first."""
    for turn, one in enumerate(asked):
        image = cell if turn == 0 else str(first)
        writer.writerow([first + turn, image, path, one.text, one.answer, one.category])


def write_lessons(
    folder: Path,
    atlas: Atlas,
    world: World,
    seed: int,
    count: int,
    say: Say = lambda pictures: None,
    workers: int = 0,
    short: bool = False,
    questions: int = QUESTIONS_PER_CONVERSATION,
) -> None:
    """Write training data: `lessons.jsonl`, one conversation a line, and `pictures/`.

    A scene with many questions is split into several conversations of at most `questions`. Without
    `short`, some lessons ask about one detail in several pictures or in a long text. A lesson
    depends only on the seed and its number, so any number of `workers` writes the same files.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    parts = [
        range(first, min(first + LESSONS_PER_TASK, count))
        for first in range(0, count, LESSONS_PER_TASK)
    ]
    with (folder / LESSONS).open("w", encoding="utf-8") as handle, ExitStack() as stack:
        draw = partial(_draw_part, folder, atlas, world, seed, short, questions)
        if workers:
            # Spawned: forking a process with threads, such as torch's, is unsafe.
            pool = ProcessPoolExecutor(workers, get_context("spawn"))
            stack.callback(pool.shutdown, cancel_futures=True)
            with block_interrupts():
                lines = pool.map(draw, parts)
        else:
            lines = map(draw, parts)
        for part, text in zip(parts, lines, strict=True):
            handle.write(text)
            say(len(part))


def _draw_part(
    folder: Path,
    atlas: Atlas,
    world: World,
    seed: int,
    short: bool,
    questions: int,
    numbers: range,
) -> str:
    """Write the pictures of some lessons; return their lines of JSON."""
    lines = []
    for number in numbers:
        before, scenes, asked = _draw_one(
            Random(f"{seed} lesson {number}"), world, None if short else number
        )
        names = [f"{PICTURES}/{number:07d}-{i}.png" for i in range(len(scenes))]
        for name, scene in zip(names, scenes, strict=True):
            render(scene, atlas).save(folder / name, compress_level=1)
        for first in range(0, len(asked), questions):
            line = conversation(
                f"scene-{number}-{first}",
                names,
                asked[first : first + questions],
                before,
            )
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _draw_one(
    rng: Random, world: World, number: int | None
) -> tuple[str, Sequence[Scene], Sequence[Question]]:
    """Text before the first question, scenes and questions of lesson `number`.

    None for `number` gives a lesson about one picture.
    """
    if number is not None and number % LONG_EVERY == 1:
        scenes, pair = draw_pictures(rng, world, rng.randint(2, MAX_PICTURES))
        return "", scenes, pair
    if number is not None and number % LONG_EVERY == 2 and world.words:
        text, pair, _ = draw_text(rng, world, rng.randint(4, MAX_SENTENCES))
        return f"{text}\n", (), pair
    scene, asked = draw_lesson(rng, world)
    return "", (scene,), asked


def conversation(
    name: str, pictures: Sequence[str], asked: Sequence[Question], before: str = ""
) -> dict[str, object]:
    """One training record; pictures and the text `before` belong to the first question."""
    turns: list[dict[str, str]] = []
    for one in asked:
        text = one.text if turns else before + one.text
        if not turns and pictures:
            text = place_images(text, len(pictures))
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": one.answer}]
    shown = {"image": list(pictures) if len(pictures) > 1 else pictures[0]} if pictures else {}
    return {"id": name, **shown, "conversations": turns}


def encode(picture: Image.Image) -> str:
    """A PNG as base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
