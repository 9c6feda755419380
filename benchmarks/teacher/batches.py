"""Training batches of the small teacher, a function of seed and step, computed by workers.

The questions of a lesson share its picture. Each question is a branch that attends to the picture
and to itself, so one prefill serves many questions; rotary positions count along the branch. Inputs
with one question are plain sequences. Legend: B rows, T columns, A answer tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from prompts import TOKENS_PER_TILE, Prompts

from mmmamba_cli.processing.chat_template import place_images
from mmmamba_evals.scenes.batch_renderer import SceneBatch, SceneEncoder
from mmmamba_evals.scenes.composition import SIDE
from mmmamba_evals.scenes.lessons import MAX_THINGS, draw_lesson
from mmmamba_evals.scenes.long_inputs import (
    PICTURES,
    PIXELS_PER_THING,
    TILES,
    WHAT_NEEDLE,
    draw_large,
    draw_pictures,
    draw_text,
)
from mmmamba_evals.scenes.questions import NO, YES
from mmmamba_evals.scenes.scene import Question
from mmmamba_evals.scenes.world import World

IGNORED = -100
# Columns of a lesson: the prefix with the picture, and its questions.
LESSON_COLUMNS = 464
# Answer tokens per row.
ANSWERS = 64
LESSON, LARGE, MANY, TEXT = "lesson", "large", "many", "text"
OBJECTS = (
    "existence",
    "count",
    "position",
    "colour",
    "OCR",
    "list",
    "spelling",
    "place",
    "side",
    "reading",
)
CATEGORIES = (*OBJECTS, PICTURES, TILES, TEXT)
# Added to the category of a yes-or-no question, so that its accuracy is reported separately.
CLOSED = len(CATEGORIES)
# Loss weight per question: larger for long answers, but not proportional to their length.
WEIGHT = {"list": 3.0, "reading": 4.0, "spelling": 2.5, "position": 2.0, "side": 2.0}
GRIDS = ((2, 1), (1, 2), (2, 2), (3, 1), (3, 2), (2, 3))


@dataclass
class Lessons:
    """Training data of one step.

    `ids`, `positions` and `branch` are (B, T). `columns`, `targets`, `weights` and `category` are
    (B, A), for the columns that predict answer tokens. `category` is -1 except at the first token
    of an answer; yes-or-no questions have CLOSED added. `layouts` has the pictures in order, None
    for text; `grid` is (columns, rows) of tiles if each picture has several.
    """

    kind: str
    ids: np.ndarray
    positions: np.ndarray
    branch: np.ndarray
    columns: np.ndarray
    targets: np.ndarray
    category: np.ndarray
    weights: np.ndarray
    layouts: SceneBatch | None
    grid: tuple[int, int] | None = None


class Batcher:
    """Makes batch `step` of a seed, deterministically."""

    def __init__(self, prompts: Prompts, layouter: SceneEncoder, world: World, seed: int):
        self.prompts = prompts
        self.layouter = layouter
        self.world = world
        self.seed = seed

    def lessons(self, step: int, rows: int) -> Lessons:
        """Pictures of one tile, each with the questions that fit into LESSON_COLUMNS."""
        rng = Random(f"{self.seed} {LESSON} {step}")
        drawn = [draw_lesson(rng, self.world) for _ in range(rows)]
        arrays = self._arrays(rows, LESSON_COLUMNS)
        prefix = self.prompts.prefix("<image>", 1)
        for row, (_, asked) in enumerate(drawn):
            self._fill(arrays, row, prefix, asked)
        layouts = self.layouter.layouts([scene for scene, _ in drawn], MAX_THINGS)
        return Lessons(LESSON, *arrays, layouts)

    def large(self, step: int, pictures: int) -> Lessons:
        """Pictures of several tiles and a thumbnail, half lessons and half about one detail."""
        rng = Random(f"{self.seed} {LARGE} {step}")
        grid = rng.choice(GRIDS)
        tiles = grid[0] * grid[1] + 1
        rows = max(1, pictures // tiles)
        drawn = []
        for row in range(rows):
            if row % 2:
                drawn.append(draw_lesson(rng, self.world, grid[0] * SIDE, grid[1] * SIDE))
            else:
                scene, pair = draw_large(rng, self.world, *grid)
                drawn.append((scene, list(pair)))
        prefix = self.prompts.prefix("<image>", tiles)
        arrays = self._arrays(rows, len(prefix) + LESSON_COLUMNS - TOKENS_PER_TILE)
        for row, (_, asked) in enumerate(drawn):
            self._fill(arrays, row, prefix, asked)
        most = max(MAX_THINGS, grid[0] * grid[1] * SIDE**2 // PIXELS_PER_THING)
        layouts = self.layouter.layouts([scene for scene, _ in drawn], most)
        return Lessons(LARGE, *arrays, layouts, grid)

    def many(self, step: int, pictures: int, each: int) -> Lessons:
        """`each` pictures per row, and questions about one detail among them."""
        rng = Random(f"{self.seed} {MANY} {step}")
        rows = max(1, pictures // each)
        drawn = [draw_pictures(rng, self.world, each) for _ in range(rows)]
        prefix = self.prompts.prefix(place_images("", each).removesuffix("\n"), 1)
        arrays = self._arrays(rows, len(prefix) + 80)
        for row, (_, pair) in enumerate(drawn):
            self._fill(arrays, row, prefix, list(pair))
        scenes = [scene for shown, _ in drawn for scene in shown]
        return Lessons(MANY, *arrays, self.layouter.layouts(scenes, MAX_THINGS))

    def text(self, step: int, rows: int, sentences: int) -> Lessons:
        """Long texts with questions about their secret word."""
        rng = Random(f"{self.seed} {TEXT} {step}")
        drawn = []
        for _ in range(rows):
            text, pair, secret = draw_text(rng, self.world, sentences)
            drawn.append(
                (self.prompts.text_prefix(text), [*pair, Question(TEXT, WHAT_NEEDLE, secret)])
            )
        arrays = self._arrays(rows, max(len(prefix) for prefix, _ in drawn) + 120)
        for row, (prefix, asked) in enumerate(drawn):
            self._fill(arrays, row, prefix, asked, after_text=True)
        return Lessons(TEXT, *arrays, None)

    def _arrays(self, rows: int, columns: int) -> tuple[np.ndarray, ...]:
        return _arrays(rows, columns, self.prompts.pad)

    def _fill(
        self,
        arrays: tuple[np.ndarray, ...],
        row: int,
        prefix: Sequence[int],
        asked: Sequence[Question],
        after_text: bool = False,
    ) -> None:
        ids, positions, branch, columns, targets, category, weights = (
            array[row] for array in arrays
        )
        end, taken = len(prefix), 0
        ids[:end], positions[:end], branch[:end] = prefix, np.arange(end), 0
        for number, one in enumerate(asked, start=1):
            words, answered = self.prompts.branch(one, after_text)
            stop = end + len(words)
            if stop > len(ids) or taken + answered > ANSWERS:
                continue
            ids[end:stop] = words
            positions[end:stop] = len(prefix) + np.arange(len(words))
            branch[end:stop] = number
            # A column predicts the next column of its branch.
            columns[taken : taken + answered] = np.arange(stop - answered - 1, stop - 1)
            targets[taken : taken + answered] = words[-answered:]
            closed = CLOSED * (one.answer in (YES, NO))
            category[taken] = CATEGORIES.index(one.category) + closed
            weights[taken : taken + answered] = WEIGHT.get(one.category, 1.0) / answered
            end, taken = stop, taken + answered


def _arrays(rows: int, columns: int, pad: int) -> tuple[np.ndarray, ...]:
    """Empty arrays of `Lessons`; branch -1 is padding."""
    ids = np.full((rows, columns), pad, np.int64)
    positions = np.zeros((rows, columns), np.int64)
    branch = np.full((rows, columns), -1, np.int64)
    answer_columns = np.zeros((rows, ANSWERS), np.int64)
    targets = np.full((rows, ANSWERS), IGNORED, np.int64)
    weights = np.zeros((rows, ANSWERS), np.float32)
    return ids, positions, branch, answer_columns, targets, np.full_like(targets, -1), weights
