"""The shipped atlas (about a hundred classes in two vendors' styles) and its suites."""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes.atlas import Atlas, open_atlas
from mmmamba_evals.scenes.fonts import SEEN, UNSEEN, fonts_of
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_suite import (
    ALL_LENGTHS,
    INPUTS_PER_LENGTH,
    INPUTS_PER_LENGTH_V1,
    TRAINED_LENGTHS,
    write_long_suite,
)
from mmmamba_evals.scenes.renderer import render
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.scene_writers import TABLE, write_suite
from mmmamba_evals.scenes.world import make_world

FOLDER = Path(__file__).parent / "atlas"
# The shipped teacher was trained on the first style only.
SEEN_STYLE, UNSEEN_STYLE = "noto", "fluent"
STYLES = (SEEN_STYLE, UNSEEN_STYLE)
# The seed of the test suites; no training data uses it.
TEST_SEED = 77_000_077


@cache
def shipped_atlas(style: str = SEEN_STYLE) -> Atlas:
    """The atlas of a shipped style. Raises `DataError` for another style."""
    if style not in STYLES:
        raise DataError(f"style {style} does not ship", f"give {' or '.join(STYLES)}, or a folder")
    return open_atlas(FOLDER / style)


def sample_scene(seed: int = 0) -> tuple[Image.Image, list[Question]]:
    """A picture as in the shipped teacher's lessons, and questions about it with their answers.

    The picture is RGB, 224 x 224 pixels: one tile. Both are a function of the seed.
    """
    atlas = shipped_atlas(SEEN_STYLE)
    world = make_world(atlas, fonts_of(SEEN))
    scene, questions = draw_lesson(Random(f"{TEST_SEED} sample {seed}"), world)
    return render(scene, atlas), questions


def build_scenes(folder: Path) -> None:
    """Write `SCENES.tsv`, in the style and fonts that the shipped teacher was trained on."""
    _build(folder / TABLE, SEEN_STYLE, SEEN)


def build_scenes_unseen(folder: Path) -> None:
    """Write `SCENES_UNSEEN.tsv`, in a style and fonts that the teacher has not seen."""
    _build(folder / "SCENES_UNSEEN.tsv", UNSEEN_STYLE, UNSEEN)


def build_scenes_long(folder: Path) -> None:
    """Write `SCENES_LONG.tsv`, in the style that the teacher was trained on."""
    _build_long(folder, INPUTS_PER_LENGTH)


def build_scenes_long_v1(folder: Path) -> None:
    """Write the table of version 1, with a quarter of the questions."""
    _build_long(folder, INPUTS_PER_LENGTH_V1)


def build_scenes_long_4k(folder: Path) -> None:
    """Write the table without the lengths that the teacher was not trained on."""
    _build_long(folder, INPUTS_PER_LENGTH, TRAINED_LENGTHS)


def _build_long(folder: Path, each: int, lengths: Container[str] = ALL_LENGTHS) -> None:
    atlas = shipped_atlas(SEEN_STYLE)
    world = make_world(atlas, fonts_of(SEEN))
    write_long_suite(folder, atlas, world, TEST_SEED, each, lengths=lengths)


def _build(file: Path, style: str, fonts: str) -> None:
    atlas = shipped_atlas(style)
    write_suite(file, atlas, make_world(atlas, fonts_of(fonts)), TEST_SEED)
