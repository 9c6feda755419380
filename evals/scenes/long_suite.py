"""Writer of the long-input suite: a table, with the pictures in files beside it.

All rows share one pool of pictures, so that a row with hundreds of them takes little disk space.
"""

from __future__ import annotations

import csv
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.composition import Content, compose
from mmmamba_evals.scenes.long_inputs import (
    PICTURES,
    TEXT,
    TILES,
    draw_large,
    draw_text,
    found_pair,
    names_without,
)
from mmmamba_evals.scenes.renderer import render
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.scene_writers import COLUMNS, encode
from mmmamba_evals.scenes.world import World

LONG_TABLE, POOL_FOLDER = "SCENES_LONG.tsv", "pool"
# Number of pictures, tiles per side and sentences by approximate prompt length in tokens of the
# shipped teacher.
PICTURES_OF = {"1K": 14, "2K": 28, "4K": 57, "8K": 115, "16K": 230, "32K": 460}
SIDE_OF = {"1K": 3, "2K": 5, "4K": 8}
SENTENCES_OF = {"1K": 72, "2K": 150, "4K": 300, "8K": 600, "16K": 1200, "32K": 2400}
ALL_LENGTHS = tuple(PICTURES_OF)
# Those that the shipped teacher was trained on.
TRAINED_LENGTHS = ("1K", "2K", "4K")
# Inputs per length, with two questions each, of the suite and of its first version. The first
# INPUTS_PER_LENGTH_V1 inputs of both are the same.
INPUTS_PER_LENGTH, INPUTS_PER_LENGTH_V1 = 100, 25
# Scenes in the pool.
POOL_SIZE = 512


def write_long_suite(
    folder: Path,
    atlas: Atlas,
    world: World,
    seed: int,
    each: int = INPUTS_PER_LENGTH,
    pool: int = POOL_SIZE,
    lengths: Container[str] = ALL_LENGTHS,
) -> int:
    """Write the table and its pool of pictures; return the number of questions.

    Of each kind of input it has those of `lengths`.
    """
    (folder / POOL_FOLDER).mkdir()
    index = 0
    with (folder / LONG_TABLE).open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        shown = _write_pool(folder / POOL_FOLDER, atlas, world, seed, pool)
        for rows in (
            _many(folder / POOL_FOLDER, atlas, world, seed, each, shown, lengths),
            _large(atlas, world, seed, each, lengths),
            _texts(world, seed, each, lengths),
        ):
            for image, path, asked, category in rows:
                for turn, one in enumerate(asked):
                    cell = image if turn == 0 or not image else str(index - turn)
                    writer.writerow([index, cell, path, one.text, one.answer, category])
                    index += 1
    return index


Row = tuple[str, str, Any, str]


def _write_pool(
    folder: Path, atlas: Atlas, world: World, seed: int, pool: int
) -> list[frozenset[str]]:
    """Write the pool of scenes; return the classes that each shows."""
    shown = []
    for number in range(pool):
        rng = Random(f"{seed} pool {number}")
        names = names_without(rng, world, set())
        scene = compose(rng, world, [Content(name) for name in names])
        render(scene, atlas).save(folder / f"{number}.png")
        shown.append(frozenset(names))
    return shown


def _many(
    folder: Path,
    atlas: Atlas,
    world: World,
    seed: int,
    each: int,
    shown: list[frozenset[str]],
    lengths: Container[str],
) -> Iterator[Row]:
    """Rows of many pictures; all but one are from the pool and show neither of the two classes."""
    for length, pictures in _of(PICTURES_OF, lengths):
        for number in range(each):
            rng = Random(f"{seed} {PICTURES} {length} {number}")
            there, missing = rng.sample(world.classes, 2)
            fitting = [i for i, names in enumerate(shown) if not {there, missing} & names]
            chosen = [f"{POOL_FOLDER}/{i}.png" for i in rng.choices(fitting, k=pictures)]
            names = [there, *names_without(rng, world, {there, missing})[1:]]
            scene = compose(rng, world, [Content(name) for name in names])
            own = f"{POOL_FOLDER}/{length}-{number}.png"
            render(scene, atlas).save(folder.parent / own)
            chosen[rng.randrange(pictures)] = own
            pair = found_pair(rng, PICTURES, there, missing, pictures)
            yield "", str(chosen), pair, f"{PICTURES} {length}"


def _large(
    atlas: Atlas, world: World, seed: int, each: int, lengths: Container[str]
) -> Iterator[Row]:
    for length, side in _of(SIDE_OF, lengths):
        for number in range(each):
            scene, pair = draw_large(Random(f"{seed} {TILES} {length} {number}"), world, side, side)
            path = f"{TILES}/{length}-{number}.png"
            yield encode(render(scene, atlas)), path, pair, f"{TILES} {length}"


def _texts(world: World, seed: int, each: int, lengths: Container[str]) -> Iterator[Row]:
    for length, sentences in _of(SENTENCES_OF, lengths):
        for number in range(each):
            text, pair, _ = draw_text(Random(f"{seed} {TEXT} {length} {number}"), world, sentences)
            asked = [Question(one.category, f"{text}\n{one.text}", one.answer) for one in pair]
            yield "", "", asked, f"{TEXT} {length}"


def _of(sizes: Mapping[str, int], lengths: Container[str]) -> Iterator[tuple[str, int]]:
    """The sizes of these lengths."""
    return ((length, size) for length, size in sizes.items() if length in lengths)
