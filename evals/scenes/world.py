"""What there is to draw with: pictures of things, words, fonts, colours, and what goes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.classes import class_table

# A scene and what it lacks must be two draws from one theme, so a theme needs twice this many.
SMALLEST_THEME = 6
# Where classes have no theme of this size, all of them are one.
EVERYTHING = "everything"

# Name -> hue in turns. They lie so far apart that no two of them are taken for each other.
COLOURS: Mapping[str, float] = {
    "red": 0.0,
    "orange": 24 / 360,
    "yellow": 56 / 360,
    "green": 120 / 360,
    "blue": 218 / 360,
    "purple": 282 / 360,
}
NUMBERS = (1, 2, 3, 4)


@dataclass(frozen=True)
class World:
    """Classes by theme, and of each class how many drawings; indexes of fonts that may be used.

    `colourable` are (class, variant) of one saturated hue, which can be turned to any colour.
    """

    themes: Mapping[str, tuple[str, ...]]
    variants: Mapping[str, int]
    colourable: Mapping[str, tuple[int, ...]]
    words: tuple[str, ...]
    fonts: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(self.variants))


def make_world(atlas: Atlas, fonts: Sequence[int]) -> World:
    """The world of an atlas. Raises `DataError` if it has too few classes to ask about."""
    names = sorted(atlas.sprites)
    if len(names) < SMALLEST_THEME:
        raise DataError(
            f"the atlas {atlas.folder} has {len(names)} classes, at least {SMALLEST_THEME} are "
            "needed",
            "every class is a folder CLASS/*.png",
        )
    return World(
        themes=_themes(names),
        variants={name: len(atlas.sprites[name]) for name in names},
        colourable={
            name: turnable
            for name in names
            if (
                turnable := tuple(i for i, s in enumerate(atlas.sprites[name]) if s.hue is not None)
            )
        },
        words=tuple(word for word in all_words() if word not in names),
        fonts=tuple(fonts),
    )


def _themes(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Classes by theme; those in no theme of some size are in one with everybody."""
    table = class_table()
    found: dict[str, list[str]] = {}
    for name in names:
        for theme in table[name].themes if name in table else ():
            found.setdefault(theme, []).append(name)
    themes = {
        theme: tuple(members)
        for theme, members in sorted(found.items())
        if len(members) >= SMALLEST_THEME
    }
    placed = {name for members in themes.values() for name in members}
    if not placed.issuperset(names):
        themes[EVERYTHING] = tuple(names)
    return themes


@cache
def all_words() -> tuple[str, ...]:
    """The words that may be written into a picture."""
    text = (resources.files(__package__) / "words.txt").read_text(encoding="utf-8")
    return tuple(text.split())
