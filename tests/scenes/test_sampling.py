"""Every answer is true of its scene, and no wording is correlated with yes or no."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest

from mmmamba_evals.scenes.blind_baseline import category_draws
from mmmamba_evals.scenes.categories import PAIRS, SPLITS
from mmmamba_evals.scenes.classes import number_word, plural
from mmmamba_evals.scenes.lessons import draw_lesson
from mmmamba_evals.scenes.long_inputs import draw_large, draw_pictures, draw_text
from mmmamba_evals.scenes.sampling import draw_present_and_absent, sides_of
from mmmamba_evals.scenes.scene import Question, Scene, Thing
from mmmamba_evals.scenes.world import COLOURS, World

CATEGORIES = (*SPLITS, *PAIRS)
NUMBER = {number_word(n): n for n in range(8)}


def named_in(text: str, world: World) -> list[str]:
    """Classes named in a text, singular or plural; longer names match first."""
    found: list[tuple[int, str]] = []
    taken = text.lower()
    for name in sorted(world.classes, key=len, reverse=True):
        for form in (plural(name), name):
            match = re.search(rf"\b{re.escape(form)}\b", taken)
            if match:
                found.append((match.start(), name))
                taken = taken[: match.start()] + "#" * len(form) + taken[match.end() :]
                break
    return [name for _, name in sorted(found)]


def words_in(scene: Scene) -> list[str]:
    return [one.word for one in sorted(scene.letterings, key=lambda one: one.y)]


def truth(scene: Scene, one: Question, world: World) -> str:
    """The answer, derived from the scene and the text of the question."""
    text = one.text.lower()
    quoted = re.findall(r'"(\w+)"', text)
    if quoted:
        return yes(quoted[0] in words_in(scene))
    names = named_in(text, world)
    side = re.search("left of|right of|above|below", text)
    if side:
        first, second = (scene.named(name)[0] for name in names)
        return yes(lies(first, second, side.group()))
    colour = re.search(rf"\b({'|'.join(COLOURS)})\b[?]", text)
    if colour:
        return yes(scene.named(names[0])[0].colour == colour.group(1))
    if "exactly" in text:
        number = next(NUMBER[word] for word in text.split() if word in NUMBER)
        return yes(len(scene.named(names[0])) == number)
    return yes(bool(scene.named(names[0])))


def lies(first: Thing, second: Thing, side: str) -> bool:
    if side in ("left of", "right of"):
        return (first.x < second.x) == (side == "left of")
    return (first.y < second.y) == (side == "above")


def yes(value: bool) -> str:
    return "Yes" if value else "No"


@pytest.mark.parametrize("category", CATEGORIES)
def test_answers_are_true(world: World, category: str) -> None:
    draw = category_draws(world)[category]
    for number in range(150):
        scene, asked = draw(Random(f"true {number}"), world)
        assert asked
        for one in asked:
            assert one.category == category
            assert one.answer == truth(scene, one, world), one


@pytest.mark.parametrize("category", CATEGORIES)
def test_yes_and_no_are_balanced(world: World, category: str) -> None:
    draw = category_draws(world)[category]
    for number in range(50):
        answers = Counter(one.answer for one in draw(Random(number), world)[1])
        assert answers["Yes"] == answers["No"] == (3 if category in SPLITS else 1)


@pytest.mark.parametrize("split", SPLITS)
def test_present_and_absent_classes_have_one_distribution(world: World, split: str) -> None:
    there: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    rng = Random(5)
    for _ in range(6000):
        present, absent = draw_present_and_absent(rng, world, split)
        assert len(present) == len(absent)
        assert not set(present) & set(absent)
        there.update(present)
        missing.update(absent)
    for name in world.classes:
        both = there[name] + missing[name]
        # Five standard deviations of a fair coin: false alarms are negligible over all classes.
        assert abs(there[name] - missing[name]) <= 5 * both**0.5 + 1, name


def test_popular_and_adversarial_splits(world: World) -> None:
    rng = Random(1)
    counts = {split: Counter[str]() for split in SPLITS}
    for _ in range(2000):
        for split in SPLITS:
            present, absent = draw_present_and_absent(rng, world, split)
            counts[split].update(present)
            if split == "adversarial":
                together = [t for t in world.themes.values() if set(present + absent) <= set(t)]
                assert together
    top = {split: counts[split].most_common(1)[0][1] for split in SPLITS}
    assert top["popular"] > 2 * top["random"]


def test_sides_are_unambiguous() -> None:
    rng = Random(0)
    one, other = Thing("a", 0, 50, 100, 40), Thing("b", 0, 120, 110, 40)
    assert {sides_of(rng, one, other) for _ in range(20)} == {("to the left of", "to the right of")}
    below = Thing("b", 0, 60, 180, 40)
    assert {sides_of(rng, below, one)[0] for _ in range(20)} == {"below"}
    corner = Thing("b", 0, 120, 180, 40)
    assert {sides_of(rng, corner, one)[0] for _ in range(40)} == {"to the right of", "below"}


def test_lesson_answers_are_true(world: World) -> None:
    seen: Counter[str] = Counter()
    for number in range(400):
        scene, asked = draw_lesson(Random(number), world)
        for one in asked:
            seen[one.category] += 1
            if one.answer in ("Yes", "No"):
                assert one.answer == truth(scene, one, world), one
            elif one.category == "list":
                things = sorted(scene.things, key=lambda thing: thing.x)
                assert one.answer == ", ".join(thing.name for thing in things)
            elif one.category == "count":
                (name,) = named_in(one.text, world)
                assert NUMBER[one.answer] == len(scene.named(name))
            elif one.category == "colour":
                (name,) = named_in(one.text, world)
                assert one.answer == scene.named(name)[0].colour
            elif one.category in ("OCR", "spelling"):
                assert [one.answer.replace(" ", "")] == words_in(scene)
            elif one.category == "reading":
                assert one.answer.split(", ") == words_in(scene)
            elif one.category == "side":
                first, second = (scene.named(name)[0] for name in named_in(one.text, world))
                of = " of" if one.answer in ("left", "right") else ""
                assert f"{one.answer} or" in one.text or f"or {one.answer}" in one.text
                assert lies(first, second, one.answer + of)
            else:
                check_place(scene, one, world)
    assert set(seen) == {
        *("list", "existence", "count", "colour", "OCR", "spelling", "place", "position"),
        *("side", "reading"),
    }


def check_place(scene: Scene, one: Question, world: World) -> None:
    assert one.category == "place"
    (name,) = named_in(one.text.replace("picture", ""), world)
    (thing,) = scene.named(name)
    assert ("left" in one.answer) == (thing.x < scene.width / 3)
    assert ("right" in one.answer) == (thing.x >= 2 * scene.width / 3)
    assert ("top" in one.answer) == (thing.y < scene.height / 3)
    assert ("bottom" in one.answer) == (thing.y >= 2 * scene.height / 3)


def test_long_inputs_have_one_detail(world: World) -> None:
    for number in range(40):
        rng = Random(number)
        scenes, pair = draw_pictures(rng, world, 9)
        for one in pair:
            (name,) = named_in(one.text.replace("pictures", ""), world)
            shown = sum(bool(scene.named(name)) for scene in scenes)
            assert shown == (1 if one.answer == "Yes" else 0)
        scene, pair = draw_large(rng, world, 3, 2)
        assert (scene.width, scene.height) == (672, 448)
        for one in pair:
            (name,) = named_in(one.text.replace("picture", ""), world)
            assert len(scene.named(name)) == (1 if one.answer == "Yes" else 0)
        text, pair, _ = draw_text(rng, world, 30)
        (secret,) = re.findall(r'The secret word is "(\w+)"', text)
        for one in pair:
            assert (f'"{secret}"' in one.text) == (one.answer == "Yes")


def test_sampling_is_deterministic(world: World) -> None:
    for draw in category_draws(world).values():
        assert draw(Random("x"), world) == draw(Random("x"), world)
        assert draw(Random("x"), world) != draw(Random("y"), world)
