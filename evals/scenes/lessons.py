"""Training scenes: one picture with many questions and a list of everything in it.

The yes/no questions are those of `sampling`, true and false ones about the same scene. Open
questions are added because a word carries more training signal than yes or no, and a list of all
things or words carries most.
"""

from __future__ import annotations

from random import Random

from mmmamba_evals.scenes import questions as templates
from mmmamba_evals.scenes.categories import ADVERSARIAL, RANDOM
from mmmamba_evals.scenes.classes import number_word
from mmmamba_evals.scenes.composition import SIDE, Content, compose
from mmmamba_evals.scenes.questions import NO, YES
from mmmamba_evals.scenes.sampling import (
    draw_present_and_absent,
    shuffled,
    sides_of,
)
from mmmamba_evals.scenes.scene import Question, Scene
from mmmamba_evals.scenes.world import COLOURS, NUMBERS, World

# Probabilities: of a class that appears several times, of a recoloured thing, of a word in a
# picture of things, and of a picture that is mostly words.
P_SEVERAL, P_RECOLOURED, P_WORD, P_READING = 0.8, 0.5, 0.6, 0.4
MAX_THINGS, MAX_WORDS = 7, 4
# Probabilities: of "how many" about an absent class, and of spelling instead of naming a word.
P_ABSENT, P_SPELLING = 0.3, 0.3


def draw_lesson(
    rng: Random, world: World, width: int = SIDE, height: int = SIDE
) -> tuple[Scene, list[Question]]:
    """A scene, and questions about it in random order."""
    readable = bool(world.words and world.fonts)
    if readable and rng.random() < P_READING:
        scene, asked = _of_words(rng, world, width, height)
    else:
        scene, asked = _of_things(rng, world, readable, width, height)
    return scene, shuffled(rng, asked)


def _of_things(
    rng: Random, world: World, readable: bool, width: int, height: int
) -> tuple[Scene, list[Question]]:
    split = rng.choice((RANDOM, ADVERSARIAL))
    present, absent = draw_present_and_absent(rng, world, split)
    contents = _contents(rng, world, present)
    words = [rng.choice(world.words)] if readable and rng.random() < P_WORD else []
    scene = compose(rng, world, contents, words, width, height)
    return scene, [
        Question("list", templates.LIST_ALL, list_of(scene)),
        *_existence(rng, contents, absent),
        *_positions(rng, scene, contents),
        *_counts(rng, contents[0], absent),
        *_colours(rng, contents),
        *_word(rng, world, scene),
        *_where(rng, scene, contents),
    ]


def _of_words(rng: Random, world: World, width: int, height: int) -> tuple[Scene, list[Question]]:
    """A scene of several words and one or two things."""
    present, _ = draw_present_and_absent(rng, world, RANDOM)
    contents = [Content(name) for name in present[: rng.randint(1, 2)]]
    words = rng.sample(world.words, rng.randint(2, MAX_WORDS))
    missing = rng.sample([word for word in world.words if word not in words], 2)
    scene = compose(rng, world, contents, words, width, height)
    return scene, [
        Question("reading", templates.READ, words_of(scene)),
        Question("list", templates.LIST_ALL, list_of(scene)),
        *(Question("OCR", templates.ask_word(rng, word), YES) for word in words[:2]),
        *(Question("OCR", templates.ask_word(rng, word), NO) for word in missing),
        *_where(rng, scene, contents),
    ]


def _contents(rng: Random, world: World, present: list[str]) -> list[Content]:
    """The classes of the scene; the first may appear several times, the others once."""
    count = rng.choice(NUMBERS) if rng.random() < P_SEVERAL else 1
    # From one class to many: counting needs training scenes with few things too.
    names = present[: rng.randint(1, min(len(present), MAX_THINGS - count))]
    found = []
    for i, name in enumerate(names):
        turned = name in world.colourable and rng.random() < P_RECOLOURED
        colour = rng.choice(list(COLOURS)) if turned else None
        found.append(Content(name, count if i == 0 else 1, colour))
    return found


def list_of(scene: Scene) -> str:
    """Every thing by its name, from left to right."""
    return ", ".join(thing.name for thing in sorted(scene.things, key=lambda thing: thing.x))


def words_of(scene: Scene) -> str:
    """Every word, from top to bottom."""
    return ", ".join(one.word for one in sorted(scene.letterings, key=lambda one: one.y))


def _existence(rng: Random, contents: list[Content], absent: list[str]) -> list[Question]:
    there, missing = rng.choice(contents).name, rng.choice(absent)
    return [
        Question("existence", templates.ask_existence(rng, there), YES),
        Question("existence", templates.ask_existence(rng, missing), NO),
    ]


def _positions(rng: Random, scene: Scene, contents: list[Content]) -> list[Question]:
    """About two pairs of things: an open question, and yes/no about the right and wrong side."""
    single = [one.name for one in contents if one.count == 1]
    if len(single) < 2:
        return []
    found = []
    for _ in range(2):
        one, other = rng.sample(single, 2)
        right, wrong = sides_of(rng, scene.named(one)[0], scene.named(other)[0])
        found += [
            Question("side", *templates.ask_side(one, right, other)),
            Question("position", templates.ask_position(rng, one, right, other), YES),
            Question("position", templates.ask_position(rng, one, wrong, other), NO),
        ]
    return found


def _counts(rng: Random, one: Content, absent: list[str]) -> list[Question]:
    wrong = rng.choice([number for number in NUMBERS if number != one.count])
    name, number = one.name, one.count
    if rng.random() < P_ABSENT:
        name, number = rng.choice(absent), 0
    return [
        Question("count", templates.ask_how_many(name), number_word(number)),
        Question("count", templates.ask_count(rng, one.name, one.count), YES),
        Question("count", templates.ask_count(rng, one.name, wrong), NO),
    ]


def _colours(rng: Random, contents: list[Content]) -> list[Question]:
    coloured = [one for one in contents if one.colour is not None and one.count == 1]
    if not coloured:
        return []
    one = rng.choice(coloured)
    assert one.colour is not None
    wrong = rng.choice([colour for colour in COLOURS if colour != one.colour])
    return [
        Question("colour", templates.ask_which_colour(one.name), one.colour),
        Question("colour", templates.ask_colour(rng, one.name, one.colour), YES),
        Question("colour", templates.ask_colour(rng, one.name, wrong), NO),
    ]


def _word(rng: Random, world: World, scene: Scene) -> list[Question]:
    """Yes/no about the word and another one, and an open question for the word or its letters."""
    if not scene.letterings:
        return []
    word = scene.letterings[0].word
    wrong = rng.choice([other for other in world.words if other != word])
    found = [
        Question("OCR", templates.ask_word(rng, word), YES),
        Question("OCR", templates.ask_word(rng, wrong), NO),
    ]
    if rng.random() < P_SPELLING:
        return [*found, Question("spelling", templates.ask_to_spell(), " ".join(word))]
    return [*found, Question("OCR", templates.ask_which_word(), word)]


def _where(rng: Random, scene: Scene, contents: list[Content]) -> list[Question]:
    """Cell of a 3 x 3 grid that contains the centre of a thing."""
    single = [one.name for one in contents if one.count == 1]
    if not single:
        return []
    name = rng.choice(single)
    (thing,) = scene.named(name)
    row, column = int(3 * thing.y / scene.height), int(3 * thing.x / scene.width)
    return [Question("place", templates.ask_where(name), templates.PLACES[row][column])]
