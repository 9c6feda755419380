"""Needle-in-a-haystack inputs: many pictures, one picture of many tiles, or a long text.

The present and the absent detail are drawn from the same distribution, as in `sampling`.
"""

from __future__ import annotations

from random import Random

from mmmamba_evals.scenes import questions as templates
from mmmamba_evals.scenes.composition import SIDE, Content, compose
from mmmamba_evals.scenes.questions import NO, YES, YES_OR_NO
from mmmamba_evals.scenes.sampling import shuffled
from mmmamba_evals.scenes.scene import Question, Scene
from mmmamba_evals.scenes.world import COLOURS, World

PICTURES, TILES, TEXT = "pictures", "tiles", "text"
# Smallest and largest number of classes of a scene.
CLASSES_RANGE = (2, 4)
# Pixels per thing in a large picture.
PIXELS_PER_THING = 15_000

SENTENCE = "The {colour} {one} is {side} the {other}."
NEEDLE = 'The secret word is "{word}".'
WHAT_NEEDLE = "What is the secret word?"
ABOUT_NEEDLE = 'Is the secret word "{word}"?'


def draw_pictures(
    rng: Random, world: World, pictures: int
) -> tuple[list[Scene], tuple[Question, Question]]:
    """Scenes of which one shows the class asked about; questions on it and on an absent class."""
    there, missing = rng.sample(world.classes, 2)
    place = rng.randrange(pictures)
    scenes = []
    for number in range(pictures):
        names = names_without(rng, world, {there, missing})
        if number == place:
            names[0] = there
        scenes.append(compose(rng, world, [Content(name) for name in names]))
    return scenes, found_pair(rng, PICTURES, there, missing, pictures)


def draw_large(
    rng: Random, world: World, columns: int, rows: int
) -> tuple[Scene, tuple[Question, Question]]:
    """One picture of `columns` x `rows` tiles full of things of the usual size, and questions."""
    there, missing = rng.sample(world.classes, 2)
    width, height = columns * SIDE, rows * SIDE
    number = max(2, width * height // PIXELS_PER_THING)
    names = [there]
    while len(names) < number:
        names += names_without(rng, world, {there, missing})
    scene = compose(rng, world, [Content(name) for name in names[:number]], (), width, height)
    return scene, found_pair(rng, TILES, there, missing, 1)


def draw_text(
    rng: Random, world: World, sentences: int
) -> tuple[str, tuple[Question, Question], str]:
    """Filler sentences with one secret word among them.

    Returns the text, the questions about the secret and about another word, and the secret.
    """
    secret, other = rng.sample(world.words, 2)
    lines = [_sentence(rng, world) for _ in range(sentences)]
    lines.insert(rng.randint(0, len(lines)), NEEDLE.format(word=secret))
    asked = [
        Question(TEXT, ABOUT_NEEDLE.format(word=secret) + YES_OR_NO, YES),
        Question(TEXT, ABOUT_NEEDLE.format(word=other) + YES_OR_NO, NO),
    ]
    first, second = shuffled(rng, asked)
    return " ".join(lines), (first, second), secret


def _sentence(rng: Random, world: World) -> str:
    one, other = rng.sample(world.classes, 2)
    return SENTENCE.format(
        colour=rng.choice(list(COLOURS)), one=one, side=rng.choice(templates.SIDES), other=other
    )


def names_without(rng: Random, world: World, without: set[str]) -> list[str]:
    """Two to four classes of one theme, none in `without`."""
    theme = [name for name in rng.choice(list(world.themes.values())) if name not in without]
    return rng.sample(theme, min(rng.randint(*CLASSES_RANGE), len(theme)))


def found_pair(
    rng: Random, category: str, there: str, missing: str, pictures: int
) -> tuple[Question, Question]:
    """The questions about the present and the absent class, in random order."""
    where = templates.ONE_PICTURE if pictures == 1 else templates.ANY_PICTURE
    asked = [
        Question(category, templates.ask_existence(rng, there, where), YES),
        Question(category, templates.ask_existence(rng, missing, where), NO),
    ]
    first, second = shuffled(rng, asked)
    return first, second
