"""The corpus `scenes:lessons`: endless lessons, drawn while a student trains.

Lesson `index` of a stream is a pure function of the seed, the stream, the index and the options.
Short lessons ask about one picture; long ones about one detail in many pictures, one large picture
or a long text. Dense lessons ask for more than yes or no.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from mmmamba_cli.data import (
    CorpusOption,
    CorpusSpec,
    CountOption,
    Drawing,
    FlagOption,
    NumberOption,
    RangeOption,
    Sample,
    TextOption,
    read_options,
)
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import Tiling
from mmmamba_cli.processing.chat_template import place_images
from mmmamba_evals.scenes import questions as templates
from mmmamba_evals.scenes.atlas import open_atlas
from mmmamba_evals.scenes.augmentation import Augmentation
from mmmamba_evals.scenes.batch_renderer import SceneEncoder
from mmmamba_evals.scenes.composition import SIDE
from mmmamba_evals.scenes.fonts import SEEN, fonts_of
from mmmamba_evals.scenes.lessons import draw_lesson, list_of
from mmmamba_evals.scenes.long_inputs import WHAT_NEEDLE, draw_large, draw_pictures, draw_text
from mmmamba_evals.scenes.painter import SceneLayout, SceneLayouts, ScenePainter
from mmmamba_evals.scenes.scene import Question, Scene
from mmmamba_evals.scenes.shipped import shipped_atlas
from mmmamba_evals.scenes.world import World, make_world

KIND = "lessons"
# Raised whenever the same options give other lessons, so that no run resumes on them.
VERSION = 2
# A picture takes about 77 tokens of the shipped teacher, a sentence about 10, a tile 64: the
# defaults reach from about 200 to 4,096 tokens.
OPTIONS: dict[str, CorpusOption] = {
    "alter": NumberOption(1.0),
    "long": NumberOption(0.33),
    "pictures": RangeOption((2, 52), 2, 512),
    "tiles": FlagOption(True),
    "sentences": RangeOption((20, 390), 1, 4000),
    "dense": NumberOption(0.5),
    # None: the shipped teacher cannot list what one of many pictures shows (3.3 nats for each token
    # of the answer, against 0.01 for yes or no).
    "lists": NumberOption(0.0),
    # One: the shipped teacher answers the first question of a conversation only. It was trained on
    # questions that do not see one another.
    "questions": CountOption(1, 1, 8),
    "atlas": TextOption("a folder of CLASS/*.png"),
}
# Sides of a large picture in units of SIDE, and its largest area. The processor enlarges squares
# from six by six to eight by eight tiles, more than 4,096 tokens.
MAX_SIDE, MAX_AREA, MAX_SQUARE = 8, 56, 5
PICTURES, TILES, TEXT = "pictures", "tiles", "text"
# How often each kind of long lesson is drawn.
LONG_SHARES = {PICTURES: 2, TILES: 1, TEXT: 1}

Lesson = tuple[str, Sequence[Scene], Sequence[Question]]


def open_lessons(spec: CorpusSpec, seed: int, stream: str) -> LessonGenerator:
    """The entry point of `mmmamba.corpora`.

    Raises:
        DataError: another kind than `lessons`, an unknown option or a value outside of its range.
    """
    if spec.kind != KIND:
        raise DataError(f"{spec.text}: scenes has no corpus {spec.kind!r}", f"write scenes:{KIND}")
    return LessonGenerator(read_options(spec, OPTIONS), seed, stream)


class LessonGenerator:
    """A `SampleGenerator` of composed scenes with the values of OPTIONS."""

    def __init__(self, options: dict[str, Any], seed: int, stream: str):
        self.options = options
        self.seed = seed
        self.stream = stream
        atlas = open_atlas(Path(options["atlas"])) if options["atlas"] else shipped_atlas()
        self.world = make_world(atlas, fonts_of(SEEN))
        strength = options["alter"]
        self._painter = ScenePainter(
            SceneEncoder(atlas, self.world), _augmentation(strength) if strength else None
        )
        shown = {name: value for name, value in options.items() if name != "atlas"}
        self.identity = f"version {VERSION}, atlas {atlas.digest}, {sorted(shown.items())}"
        drop = set() if options["tiles"] else {TILES}
        drop |= set() if self.world.words else {TEXT}
        self._long = {kind: share for kind, share in LONG_SHARES.items() if kind not in drop}

    def sample(self, index: int, name: str) -> Sample:
        rng = Random(f"{KIND} {self.seed} {self.stream} {index}")
        before, scenes, asked = self._draw(rng)
        asked = asked[: self.options["questions"]]
        key = (self.seed, crc32(self.stream.encode()), index)
        return Sample(
            name,
            _messages(before, len(scenes), asked),
            images=tuple(
                Drawing(scene.width, scene.height, SceneLayout(scene, (*key, number)))
                for number, scene in enumerate(scenes)
            ),
        )

    def stack(self, drawings: Sequence[Drawing], tiling: Tiling) -> SceneLayouts:
        return self._painter.stack(drawings, tiling)

    def to_pixels(self, layouts: SceneLayouts, device: torch.device) -> Tensor:
        return self._painter.to_pixels(layouts, device)

    def _draw(self, rng: Random) -> Lesson:
        """Text before the first question, scenes and questions."""
        options = self.options
        if rng.random() >= options["long"]:
            scene, asked = draw_lesson(rng, self.world)
            return "", (scene,), asked
        (kind,) = rng.choices(list(self._long), list(self._long.values()))
        dense = rng.random() < options["lists" if kind == PICTURES else "dense"]
        if kind == PICTURES:
            return _many_pictures(rng, self.world, log_uniform(rng, *options["pictures"]), dense)
        if kind == TILES:
            return _large_picture(rng, self.world, dense)
        return _long_text(rng, self.world, log_uniform(rng, *options["sentences"]), dense)


def log_uniform(rng: Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, uniform in its logarithm."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def _many_pictures(rng: Random, world: World, count: int, dense: bool) -> Lesson:
    scenes, pair = draw_pictures(rng, world, count)
    if not dense:
        return "", scenes, pair
    listed = rng.sample(range(count), count)
    return (
        "",
        scenes,
        [
            Question("list", templates.ask_to_list(number + 1), list_of(scenes[number]))
            for number in listed
        ],
    )


def _large_picture(rng: Random, world: World, dense: bool) -> Lesson:
    """One picture of several tiles; a dense lesson is an ordinary one on the large picture."""
    area = log_uniform(rng, 2, MAX_AREA)
    aspect = math.exp(rng.uniform(-math.log(2), math.log(2)))
    columns = min(MAX_SIDE, max(1, round(math.sqrt(area * aspect))))
    rows = min(MAX_SIDE, max(2 if columns == 1 else 1, area // columns))
    if columns == rows > MAX_SQUARE:
        rows -= 1
    if dense:
        scene, asked = draw_lesson(rng, world, columns * SIDE, rows * SIDE)
        return "", (scene,), asked
    scene, pair = draw_large(rng, world, columns, rows)
    return "", (scene,), pair


def _long_text(rng: Random, world: World, sentences: int, dense: bool) -> Lesson:
    text, pair, secret = draw_text(rng, world, sentences)
    asked = [Question(TEXT, WHAT_NEEDLE, secret)] if dense else pair
    return f"{text}\n", (), asked


def _messages(before: str, pictures: int, asked: Sequence[Question]) -> tuple[dict[str, str], ...]:
    """The turns; pictures and the text `before` belong to the first question."""
    messages = []
    for turn, one in enumerate(asked):
        text = one.text if turn else place_images(before + one.text, pictures)
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": one.answer},
        ]
    return tuple(messages)


def _augmentation(strength: float) -> Augmentation:
    """The teacher's augmentation with every largest change multiplied by `strength`."""
    full = Augmentation()
    return replace(full, **{name: value * strength for name, value in vars(full).items()})
