"""Scenes as files: tables in VLMEvalKit's layout to evaluate on, conversations to train on."""

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

from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.render import render
from mmmamba_evals.scenes.sampling import DRAWS, SPLITS, Asked, ask_about_objects, askable
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.world import World

COLUMNS = ("index", "image", "image_path", "question", "answer", "category")
TABLE, LESSONS, PICTURES = "SCENES.tsv", "lessons.jsonl", "pictures"
# Pictures of each split, with six questions, and of each other category, with two.
PICTURES_OF_SPLIT, PICTURES_OF_PAIR = 40, 100
# Lessons that a worker draws at a time.
PART = 64

Say = Callable[[int], None]


def draw_suite(
    world: World, seed: int, of_split: int = PICTURES_OF_SPLIT, of_pair: int = PICTURES_OF_PAIR
) -> Iterator[tuple[str, Asked]]:
    """(category, scene and questions) of a suite; the same for the same seed and world."""
    for split in SPLITS:
        for number in range(of_split):
            yield split, ask_about_objects(Random(f"{seed} {split} {number}"), world, split)
    for category in askable(world):
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
    """The table of a suite; returns its number of questions. `say` is told of each picture."""
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
    """Rows of one picture: the first holds it, the others name the first."""
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
) -> None:
    """`lessons.jsonl`, one conversation a line, and `pictures/` beside it, to train on.

    A lesson is a function of the seed and its number: `workers` processes, or none, write the same.
    """
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    parts = [range(first, min(first + PART, count)) for first in range(0, count, PART)]
    with (folder / LESSONS).open("w", encoding="utf-8") as handle, ExitStack() as stack:
        draw = partial(_draw_part, folder, atlas, world, seed)
        if workers:
            # Not forked: a process that has threads, as torch starts them, may not be.
            pool = ProcessPoolExecutor(workers, get_context("spawn"))
            lines = stack.enter_context(pool).map(draw, parts)
        else:
            lines = map(draw, parts)
        for part, text in zip(parts, lines, strict=True):
            handle.write(text)
            say(len(part))


def _draw_part(folder: Path, atlas: Atlas, world: World, seed: int, numbers: range) -> str:
    """Pictures of some lessons as files, and their lines."""
    lines = []
    for number in numbers:
        scene, asked = draw_lesson(Random(f"{seed} lesson {number}"), world)
        name = f"{PICTURES}/{number:07d}.png"
        render(scene, atlas).save(folder / name, compress_level=1)
        lines.append(json.dumps(conversation(number, name, asked), ensure_ascii=False) + "\n")
    return "".join(lines)


def conversation(number: int, picture: str, asked: Sequence[Question]) -> dict[str, object]:
    """A line of training data: the picture comes with the first question."""
    turns: list[dict[str, str]] = []
    for one in asked:
        text = one.text if turns else f"<image>\n{one.text}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": one.answer}]
    return {"id": f"scene-{number}", "image": picture, "conversations": turns}


def encode(picture: Image.Image) -> str:
    """A PNG as base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
