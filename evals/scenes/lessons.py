"""Scenes to learn from: one picture, many questions, and a list of everything in it.

The questions are those of `sampling`, asked about one scene at once, and the same asked openly: an
answer of one word teaches more than yes or no, and the list teaches most.
"""

from __future__ import annotations

from random import Random

from mmmamba_evals.scenes import questions as say
from mmmamba_evals.scenes.classes import number_word
from mmmamba_evals.scenes.compose import SIDE, Content, compose
from mmmamba_evals.scenes.questions import NO, YES
from mmmamba_evals.scenes.sampling import (
    ADVERSARIAL,
    RANDOM,
    draw_present_and_absent,
    shuffled,
    sides_of,
)
from mmmamba_evals.scenes.scene import Question, Scene
from mmmamba_evals.scenes.world import COLOURS, NUMBERS, World

# How often a class is there to be counted, a thing is turned to another colour, a word is written.
SEVERAL, RECOLOURED, WRITTEN = 0.8, 0.5, 0.8
MOST_THINGS = 7
OPENLY = 0.45
# Of what is asked openly about numbers, how often nothing is there; about words, how often letters.
NOTHING, SPELLED = 0.4, 0.6


def draw_lesson(
    rng: Random, world: World, width: int = SIDE, height: int = SIDE
) -> tuple[Scene, list[Question]]:
    """A scene, and questions about it in random order."""
    split = rng.choice((RANDOM, ADVERSARIAL))
    present, absent = draw_present_and_absent(rng, world, split)
    contents = _contents(rng, world, present)
    word = rng.choice(world.words) if world.words and rng.random() < WRITTEN else None
    scene = compose(rng, world, contents, word if world.fonts else None, width, height)
    asked = [
        Question("list", say.LIST_ALL, list_of(scene)),
        Question("existence", say.ask_existence(rng, rng.choice(contents).name), YES),
        Question("existence", say.ask_existence(rng, rng.choice(absent)), NO),
        _position(rng, scene, contents),
        _count(rng, contents[0], absent),
        _colour(rng, contents),
        *_word(rng, world, scene),
        _where(rng, scene, contents),
    ]
    return scene, shuffled(rng, [one for one in asked if one is not None])


def _contents(rng: Random, world: World, present: list[str]) -> list[Content]:
    """The first class is the one to be counted, the others come once."""
    count = rng.choice(NUMBERS) if rng.random() < SEVERAL else 1
    names = present[: max(2, min(len(present), MOST_THINGS - count))]
    found = []
    for i, name in enumerate(names):
        turned = name in world.colourable and rng.random() < RECOLOURED
        colour = rng.choice(list(COLOURS)) if turned else None
        found.append(Content(name, count if i == 0 else 1, colour))
    return found


def list_of(scene: Scene) -> str:
    """Every thing by its name, from left to right."""
    return ", ".join(thing.name for thing in sorted(scene.things, key=lambda thing: thing.x))


def _position(rng: Random, scene: Scene, contents: list[Content]) -> Question | None:
    single = [one.name for one in contents if one.count == 1]
    if len(single) < 2:
        return None
    one, other = rng.sample(single, 2)
    right, wrong = sides_of(rng, scene.named(one)[0], scene.named(other)[0])
    side, answer = rng.choice(((right, YES), (wrong, NO)))
    return Question("position", say.ask_position(rng, one, side, other), answer)


def _count(rng: Random, one: Content, absent: list[str]) -> Question:
    if rng.random() < OPENLY:
        if rng.random() < NOTHING:
            return Question("count", say.ask_how_many(rng.choice(absent)), number_word(0))
        return Question("count", say.ask_how_many(one.name), number_word(one.count))
    wrong = rng.choice([number for number in NUMBERS if number != one.count])
    number, answer = rng.choice(((one.count, YES), (wrong, NO)))
    return Question("count", say.ask_count(rng, one.name, number), answer)


def _colour(rng: Random, contents: list[Content]) -> Question | None:
    coloured = [one for one in contents if one.colour is not None and one.count == 1]
    if not coloured:
        return None
    one = rng.choice(coloured)
    assert one.colour is not None
    if rng.random() < OPENLY:
        return Question("colour", say.ask_which_colour(one.name), one.colour)
    wrong = rng.choice([colour for colour in COLOURS if colour != one.colour])
    colour, answer = rng.choice(((one.colour, YES), (wrong, NO)))
    return Question("colour", say.ask_colour(rng, one.name, colour), answer)


def _word(rng: Random, world: World, scene: Scene) -> list[Question]:
    """Whether it is this word, and the word itself, or its letters one by one."""
    if scene.lettering is None:
        return []
    word = scene.lettering.word
    wrong = rng.choice([other for other in world.words if other != word])
    asked, answer = rng.choice(((word, YES), (wrong, NO)))
    found = [Question("OCR", say.ask_word(rng, asked), answer)]
    if rng.random() < SPELLED:
        return [*found, Question("spelling", say.ask_to_spell(), " ".join(word))]
    return [*found, Question("OCR", say.ask_which_word(), word)]


def _where(rng: Random, scene: Scene, contents: list[Content]) -> Question | None:
    """In which ninth of the picture the middle of a thing lies."""
    single = [one.name for one in contents if one.count == 1]
    if not single:
        return None
    name = rng.choice(single)
    (thing,) = scene.named(name)
    row, column = int(3 * thing.y / scene.height), int(3 * thing.x / scene.width)
    return Question("place", say.ask_where(name), say.PLACES[row][column])
