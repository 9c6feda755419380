"""Scenes with questions that cannot be answered from the text alone.

The content of a question is drawn before its answer. The classes of a scene and the absent classes
are two draws A and B from the same distribution, both rejected if they share a class. (A, B) and
(B, A) are equally likely, so no wording is correlated with yes or no. The same holds for the order
of two things, and for the right one of two numbers, colours or words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from zlib import crc32

from mmmamba_evals.scenes import questions as templates
from mmmamba_evals.scenes.categories import ADVERSARIAL, PAIRS, POPULAR, RANDOM
from mmmamba_evals.scenes.composition import Content, compose
from mmmamba_evals.scenes.questions import NO, YES
from mmmamba_evals.scenes.scene import Question, Scene, Thing
from mmmamba_evals.scenes.world import COLOURS, NUMBERS, World

SceneQuestions = tuple[Scene, list[Question]]
Draw = Callable[[Random, World], SceneQuestions]


def draw_classes(rng: Random, theme: Sequence[str], number: int, popular: bool) -> list[str]:
    """Distinct classes of a theme, uniformly, or with weight 1 / rank if `popular`."""
    if not popular:
        return rng.sample(theme, number)
    # A rank independent of the alphabet, and the same on every machine.
    ranked = sorted(theme, key=lambda name: crc32(name.encode()))
    weights = [1 / rank for rank in range(1, len(ranked) + 1)]
    found: list[str] = []
    while len(found) < number:
        (name,) = rng.choices(ranked, weights)
        if name not in found:
            found.append(name)
    return found


def draw_present_and_absent(
    rng: Random, world: World, split: str, most: int = 5
) -> tuple[list[str], list[str]]:
    """Classes of a scene, and equally many absent ones, with POPE's negatives by `split`.

    Random and popular: from a random theme, popular with weight 1 / rank. Adversarial: from the
    theme of the scene.
    """
    themes = list(world.themes.values())
    number = rng.randint(3, max(3, most))
    while True:
        theme, other = rng.choice(themes), rng.choice(themes)
        if split == ADVERSARIAL:
            k = min(number, len(theme) // 2)
            both = rng.sample(theme, 2 * k)
            return both[:k], both[k:]
        k = min(number, len(theme) // 2, len(other) // 2)
        present = draw_classes(rng, theme, k, split == POPULAR)
        absent = draw_classes(rng, other, k, split == POPULAR)
        if not set(present) & set(absent):
            return present, absent


def ask_about_objects(rng: Random, world: World, split: str, each: int = 3) -> SceneQuestions:
    """As POPE: up to `each` questions about present classes and as many about absent ones."""
    present, absent = draw_present_and_absent(rng, world, split)
    scene = compose(rng, world, [Content(name) for name in present])
    asked = [Question(split, templates.ask_existence(rng, name), YES) for name in present[:each]]
    asked += [Question(split, templates.ask_existence(rng, name), NO) for name in absent[:each]]
    return scene, shuffled(rng, asked)


def ask_existence_pair(rng: Random, world: World) -> SceneQuestions:
    scene, asked = ask_about_objects(rng, world, RANDOM, each=1)
    return scene, [Question("existence", one.text, one.answer) for one in asked]


def ask_count_pair(rng: Random, world: World) -> SceneQuestions:
    """About the right number and a wrong one, both uniform."""
    names, _ = draw_present_and_absent(rng, world, RANDOM, most=3)
    right, wrong = rng.sample(NUMBERS, 2)
    contents = [Content(names[0], right), *(Content(n) for n in names[1 : rng.randint(1, 3)])]
    asked = [
        Question("count", templates.ask_count(rng, names[0], right), YES),
        Question("count", templates.ask_count(rng, names[0], wrong), NO),
    ]
    return compose(rng, world, contents), shuffled(rng, asked)


def ask_position_pair(rng: Random, world: World) -> SceneQuestions:
    names, _ = draw_present_and_absent(rng, world, RANDOM)
    scene = compose(rng, world, [Content(name) for name in names])
    one, other = rng.sample(names, 2)
    right, wrong = sides_of(rng, scene.named(one)[0], scene.named(other)[0])
    asked = [
        Question("position", templates.ask_position(rng, one, right, other), YES),
        Question("position", templates.ask_position(rng, one, wrong, other), NO),
    ]
    return scene, shuffled(rng, asked)


def ask_colour_pair(rng: Random, world: World) -> SceneQuestions:
    """About a thing of one saturated hue, recoloured at random."""
    name = rng.choice(sorted(world.colourable))
    right, wrong = rng.sample(list(COLOURS), 2)
    others, _ = draw_present_and_absent(rng, world, RANDOM, most=3)
    contents = [Content(name, 1, right), *(Content(n) for n in others[:3] if n != name)]
    asked = [
        Question("colour", templates.ask_colour(rng, name, right), YES),
        Question("colour", templates.ask_colour(rng, name, wrong), NO),
    ]
    return compose(rng, world, contents), shuffled(rng, asked)


def ask_word_pair(rng: Random, world: World) -> SceneQuestions:
    right, wrong = rng.sample(world.words, 2)
    names, _ = draw_present_and_absent(rng, world, RANDOM, most=3)
    scene = compose(rng, world, [Content(name) for name in names[: rng.randint(1, 3)]], [right])
    asked = [
        Question("OCR", templates.ask_word(rng, right), YES),
        Question("OCR", templates.ask_word(rng, wrong), NO),
    ]
    return scene, shuffled(rng, asked)


DRAWS: dict[str, Draw] = {
    "existence": ask_existence_pair,
    "count": ask_count_pair,
    "position": ask_position_pair,
    "colour": ask_colour_pair,
    "OCR": ask_word_pair,
}


def available_categories(world: World) -> list[str]:
    """The pair categories that a world supports: colours need a recolourable class, OCR fonts."""
    lacking = {"colour": not world.colourable, "OCR": not (world.fonts and world.words)}
    return [name for name in PAIRS if not lacking.get(name, False)]


def sides_of(rng: Random, one: Thing, other: Thing) -> tuple[str, str]:
    """A side of `other` on which `one` lies unambiguously, and the opposite side.

    Boxes do not overlap, so a horizontal or a vertical line separates them.
    """
    apart = (one.size + other.size) / 2
    found = []
    if abs(one.x - other.x) >= apart:
        found.append(templates.SIDES[:2] if one.x < other.x else templates.SIDES[1::-1])
    if abs(one.y - other.y) >= apart:
        found.append(templates.SIDES[2:] if one.y < other.y else templates.SIDES[:1:-1])
    right, wrong = rng.choice(found)
    return right, wrong


def shuffled(rng: Random, asked: list[Question]) -> list[Question]:
    rng.shuffle(asked)
    return asked
