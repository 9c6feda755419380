"""The table of object classes, and English articles, plurals and number words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    import inflect

# Plurals that inflect gets wrong.
PLURAL_OVERRIDES = {"burrito": "burritos", "flamingo": "flamingos"}
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
)


@dataclass(frozen=True)
class ObjectClass:
    """A noun with its themes (places where it is found) and its emoji's code points.

    `ships`: whether it is in the shipped atlas.
    """

    name: str
    category: str
    themes: tuple[str, ...]
    code: str
    ships: bool = False


@cache
def class_table() -> Mapping[str, ObjectClass]:
    """All classes by name."""
    text = (resources.files(__package__) / "classes.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    return {
        name: ObjectClass(name, **{**entry, "themes": tuple(entry["themes"])})
        for name, entry in raw.items()
    }


@cache
def _inflections() -> Mapping[str, tuple[str, str]]:
    """Each class with its article, and its plural, as inflect gives them.

    The import of inflect takes 2 seconds of CPU time, in every process that draws scenes.
    """
    text = (resources.files(__package__) / "inflections.yaml").read_text(encoding="utf-8")
    return {name: (first, second) for name, (first, second) in yaml.safe_load(text).items()}


@cache
def _english() -> inflect.engine:
    import inflect

    engine = inflect.engine()
    for noun, plural_form in PLURAL_OVERRIDES.items():
        engine.defnoun(noun, plural_form)
    return engine


@cache
def with_article(noun: str) -> str:
    """`an apple`, `a bus`."""
    found = _inflections().get(noun)
    return str(_english().a(noun)) if found is None else found[0]


@cache
def plural(noun: str) -> str:
    """`apples`, `buses`, `knives`; `sheep` for `sheep`."""
    found = _inflections().get(noun)
    return str(_english().plural_noun(noun)) if found is None else found[1]


@cache
def number_word(number: int) -> str:
    """`three`."""
    if 0 <= number < len(NUMBER_WORDS):
        return NUMBER_WORDS[number]
    return str(_english().number_to_words(str(number)))
