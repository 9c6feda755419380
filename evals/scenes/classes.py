"""The table of object classes, and English articles, plurals and number words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import inflect
import yaml

# Plurals that inflect gets wrong.
PLURAL_OVERRIDES = {"burrito": "burritos", "flamingo": "flamingos"}


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
def _english() -> inflect.engine:
    engine = inflect.engine()
    for noun, plural_form in PLURAL_OVERRIDES.items():
        engine.defnoun(noun, plural_form)
    return engine


@cache
def with_article(noun: str) -> str:
    """`an apple`, `a bus`."""
    return str(_english().a(noun))


@cache
def plural(noun: str) -> str:
    """`apples`, `buses`, `knives`; `sheep` for `sheep`."""
    return str(_english().plural_noun(noun))


@cache
def number_word(number: int) -> str:
    """`three`."""
    return str(_english().number_to_words(str(number)))
