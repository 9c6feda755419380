"""Scenes to learn from: one picture, many questions, and a list of everything in it.

The questions are those of `sampling`, asked about one scene at once: what is true and what is not
in one breath, since it is their difference that teaches. The same is asked openly, because an
answer of one word teaches more than yes or no, and lists of all things and of all words teach most.
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

# How often a class is there to be counted, a thing is turned to another colour, a word is written,
# and how often a picture is mostly words.
SEVERAL, RECOLOURED, WRITTEN, READING = 0.8, 0.5, 0.6, 0.4
MOST_THINGS, MOST_WORDS = 7, 4
# Of what is asked openly about numbers, how often nothing is there; of a word, how often letters.
NOTHING, SPELLED = 0.3, 0.3


def draw_lesson(
    rng: Random, world: World, width: int = SIDE, height: int = SIDE
) -> tuple[Scene, list[Question]]:
    """A scene, and questions about it in random order."""
    readable = bool(world.words and world.fonts)
    if readable and rng.random() < READING:
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
    words = [rng.choice(world.words)] if readable and rng.random() < WRITTEN else []
    scene = compose(rng, world, contents, words, width, height)
    return scene, [
        Question("list", say.LIST_ALL, list_of(scene)),
        *_existence(rng, contents, absent),
        *_positions(rng, scene, contents),
        *_counts(rng, contents[0], absent),
        *_colours(rng, contents),
        *_word(rng, world, scene),
        *_where(rng, scene, contents),
    ]


def _of_words(rng: Random, world: World, width: int, height: int) -> tuple[Scene, list[Question]]:
    """Several words, and a thing or two among them."""
    present, _ = draw_present_and_absent(rng, world, RANDOM)
    contents = [Content(name) for name in present[: rng.randint(1, 2)]]
    words = rng.sample(world.words, rng.randint(2, MOST_WORDS))
    missing = rng.sample([word for word in world.words if word not in words], 2)
    scene = compose(rng, world, contents, words, width, height)
    return scene, [
        Question("reading", say.READ, words_of(scene)),
        Question("list", say.LIST_ALL, list_of(scene)),
        *(Question("OCR", say.ask_word(rng, word), YES) for word in words[:2]),
        *(Question("OCR", say.ask_word(rng, word), NO) for word in missing),
        *_where(rng, scene, contents),
    ]


def _contents(rng: Random, world: World, present: list[str]) -> list[Content]:
    """The first class is the one to be counted, the others come once."""
    count = rng.choice(NUMBERS) if rng.random() < SEVERAL else 1
    # From one kind of things to many: who has never seen few of them cannot count them.
    names = present[: rng.randint(1, min(len(present), MOST_THINGS - count))]
    found = []
    for i, name in enumerate(names):
        turned = name in world.colourable and rng.random() < RECOLOURED
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
        Question("existence", say.ask_existence(rng, there), YES),
        Question("existence", say.ask_existence(rng, missing), NO),
    ]


def _positions(rng: Random, scene: Scene, contents: list[Content]) -> list[Question]:
    """About two pairs of things: on which side, and the right and the wrong side, yes or no."""
    single = [one.name for one in contents if one.count == 1]
    if len(single) < 2:
        return []
    found = []
    for _ in range(2):
        one, other = rng.sample(single, 2)
        right, wrong = sides_of(rng, scene.named(one)[0], scene.named(other)[0])
        found += [
            Question("side", *say.ask_side(one, right, other)),
            Question("position", say.ask_position(rng, one, right, other), YES),
            Question("position", say.ask_position(rng, one, wrong, other), NO),
        ]
    return found


def _counts(rng: Random, one: Content, absent: list[str]) -> list[Question]:
    wrong = rng.choice([number for number in NUMBERS if number != one.count])
    name, number = one.name, one.count
    if rng.random() < NOTHING:
        name, number = rng.choice(absent), 0
    return [
        Question("count", say.ask_how_many(name), number_word(number)),
        Question("count", say.ask_count(rng, one.name, one.count), YES),
        Question("count", say.ask_count(rng, one.name, wrong), NO),
    ]


def _colours(rng: Random, contents: list[Content]) -> list[Question]:
    coloured = [one for one in contents if one.colour is not None and one.count == 1]
    if not coloured:
        return []
    one = rng.choice(coloured)
    assert one.colour is not None
    wrong = rng.choice([colour for colour in COLOURS if colour != one.colour])
    return [
        Question("colour", say.ask_which_colour(one.name), one.colour),
        Question("colour", say.ask_colour(rng, one.name, one.colour), YES),
        Question("colour", say.ask_colour(rng, one.name, wrong), NO),
    ]


def _word(rng: Random, world: World, scene: Scene) -> list[Question]:
    """Whether it is this word, and the word itself, or its letters one by one."""
    if not scene.letterings:
        return []
    word = scene.letterings[0].word
    wrong = rng.choice([other for other in world.words if other != word])
    found = [
        Question("OCR", say.ask_word(rng, word), YES),
        Question("OCR", say.ask_word(rng, wrong), NO),
    ]
    if rng.random() < SPELLED:
        return [*found, Question("spelling", say.ask_to_spell(), " ".join(word))]
    return [*found, Question("OCR", say.ask_which_word(), word)]


def _where(rng: Random, scene: Scene, contents: list[Content]) -> list[Question]:
    """In which ninth of the picture the middle of a thing lies."""
    single = [one.name for one in contents if one.count == 1]
    if not single:
        return []
    name = rng.choice(single)
    (thing,) = scene.named(name)
    row, column = int(3 * thing.y / scene.height), int(3 * thing.x / scene.width)
    return [Question("place", say.ask_where(name), say.PLACES[row][column])]
