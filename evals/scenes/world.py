"""The vocabulary of scenes: classes by theme, words, fonts and colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from mmmamba_cli.errors import DataError
from mmmamba_evals.scenes.atlas import Atlas
from mmmamba_evals.scenes.classes import class_table

# Present and absent classes are drawn from one theme, so a theme needs room for both.
MIN_THEME_CLASSES = 6
# The theme of all classes, for classes without a large enough theme.
EVERYTHING = "everything"

# Name -> hue in turns, far enough apart to be told apart.
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
    """Classes by theme, the number of sprites per class, words, and indexes of fonts.

    `colourable` maps a class to its variants with one saturated hue, which can be recoloured.
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
    """The world of an atlas. Raises `DataError` if the atlas has too few classes."""
    names = sorted(atlas.sprites)
    if len(names) < MIN_THEME_CLASSES:
        raise DataError(
            f"the atlas {atlas.folder} has {len(names)} classes, at least {MIN_THEME_CLASSES} are "
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
    """Classes by theme; a class without a large enough theme adds the theme of all classes."""
    table = class_table()
    found: dict[str, list[str]] = {}
    for name in names:
        for theme in table[name].themes if name in table else ():
            found.setdefault(theme, []).append(name)
    themes = {
        theme: tuple(members)
        for theme, members in sorted(found.items())
        if len(members) >= MIN_THEME_CLASSES
    }
    placed = {name for members in themes.values() for name in members}
    if not placed.issuperset(names):
        themes[EVERYTHING] = tuple(names)
    return themes


@cache
def all_words() -> tuple[str, ...]:
    """The words that scenes may show."""
    text = (resources.files(__package__) / "words.txt").read_text(encoding="utf-8")
    return tuple(text.split())
