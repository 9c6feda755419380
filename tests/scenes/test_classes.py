"""The class table, shipped drawings and fonts, and English inflection."""

import subprocess
import sys
from collections import Counter
from importlib import resources
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageFont

from mmmamba_evals.scenes import classes
from mmmamba_evals.scenes.classes import ObjectClass, class_table, number_word, plural, with_article

SCENES = Path(str(resources.files("mmmamba_evals.scenes")))
SIDES = {"noto": 64, "fluent": 96}
SEEN = 16
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def shipping() -> list[ObjectClass]:
    return [entry for entry in class_table().values() if entry.ships]


def folder_names() -> set[str]:
    return {entry.name.replace(" ", "_") for entry in shipping()}


def fonts() -> list[dict[str, str]]:
    return yaml.safe_load((SCENES / "fonts.yaml").read_text(encoding="utf-8"))


def test_table_is_complete() -> None:
    table = class_table()
    assert len(table) > 380
    assert 90 <= len(shipping()) <= 130
    for name, entry in table.items():
        assert name == entry.name == name.strip().lower()
        assert name.replace(" ", "").replace("-", "").isascii()
        assert "_" not in name
        assert entry.category
        assert len(set(entry.themes)) == len(entry.themes) > 0
        # An unquoted code such as 2615 would be parsed as a number.
        assert isinstance(entry.code, str)
        assert all(int(part, 16) for part in entry.code.split("-"))


def test_table_has_no_duplicates() -> None:
    lines = (SCENES / "classes.yaml").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("#")]) == len(class_table())
    codes = Counter(entry.code for entry in class_table().values())
    assert [code for code, times in codes.items() if times > 1] == []


def test_every_theme_has_enough_shipped_classes() -> None:
    shipped = Counter(theme for entry in shipping() for theme in entry.themes)
    assert shipped.keys() == {theme for entry in class_table().values() for theme in entry.themes}
    assert len(shipped) >= 10
    assert min(shipped.values()) >= 12


def test_shipped_classes_span_categories() -> None:
    assert len({entry.category for entry in shipping()}) >= 9


@pytest.mark.parametrize("style", SIDES)
def test_shipped_atlas_matches_the_table(style: str) -> None:
    folder = SCENES / "atlas" / style
    assert {path.name for path in folder.iterdir() if path.is_dir()} == folder_names()
    for name in folder_names():
        assert [path.name for path in (folder / name).iterdir()] == [f"{style}.png"]


@pytest.mark.parametrize("style", SIDES)
def test_shipped_drawings_are_cropped(style: str) -> None:
    for name in folder_names():
        with Image.open(SCENES / "atlas" / style / name / f"{style}.png") as image:
            assert (image.mode, image.format) == ("RGBA", "PNG")
            assert 48 <= max(image.size) <= SIDES[style], name
            alpha = image.getchannel("A")
        # Scaling may thin the outermost row only.
        seen = alpha.point(lambda value: 255 if value >= SEEN else 0).getbbox()
        assert seen is not None
        assert seen[0] <= 1 and seen[1] <= 1, name
        assert alpha.width - seen[2] <= 1 and alpha.height - seen[3] <= 1, name


def test_styles_differ() -> None:
    for name in folder_names():
        drawings = [
            (SCENES / "atlas" / style / name / f"{style}.png").read_bytes() for style in SIDES
        ]
        assert drawings[0] != drawings[1]


def test_atlas_is_small_and_licensed() -> None:
    atlas = SCENES / "atlas"
    assert sum(path.stat().st_size for path in atlas.rglob("*.png")) < 2_000_000
    notice = (atlas / "NOTICE").read_text(encoding="utf-8")
    for words in ("Google", "Apache License 2.0", "Microsoft", "MIT License", "Changed by us"):
        assert words in notice
    assert "Apache License" in (atlas / "noto" / "LICENSE").read_text(encoding="utf-8")
    assert "Microsoft Corporation" in (atlas / "fluent" / "LICENSE").read_text(encoding="utf-8")


def test_fonts_are_listed_small_and_licensed() -> None:
    folder = SCENES / "fonts"
    listed = {font["file"] for font in fonts()}
    assert listed == {path.name for path in folder.glob("*.woff*")}
    assert len(listed) == len(fonts()) >= 15
    assert Counter(font["split"] for font in fonts())["unseen"] == 4
    assert {font["split"] for font in fonts()} == {"seen", "unseen"}
    assert all((folder / name).stat().st_size <= 40_000 for name in listed)
    assert sum((folder / name).stat().st_size for name in listed) <= 500_000
    notice = (folder / "NOTICE").read_text(encoding="utf-8").splitlines()
    for font in fonts():
        assert any(
            line.startswith(f"{font['file']} ({font['licence']}): Copyright") for line in notice
        )
    texts = {"OFL-1.1": "OFL.txt", "Apache-2.0": "LICENSE-APACHE"}
    for licence in {font["licence"] for font in fonts()}:
        assert (folder / texts[licence]).stat().st_size > 4000


@pytest.mark.parametrize("font", fonts(), ids=lambda font: font["file"])
def test_font_draws_every_letter(font: dict[str, str]) -> None:
    face = ImageFont.truetype(BytesIO((SCENES / "fonts" / font["file"]).read_bytes()), 160)
    missing = bytes(face.getmask("\ue123"))
    drawn = {letter: bytes(face.getmask(letter)) for letter in LETTERS}
    assert all(any(mask) for mask in drawn.values())
    assert missing not in drawn.values()
    # Some fonts have small capitals, but no font draws two letters alike.
    assert len(set(drawn.values())) == len(LETTERS)


AN = ["apple", "axe", "egg", "hourglass", "umbrella", "octopus", "abacus", "ice cream", "owl"]
A = ["unicorn", "horse", "yo-yo", "house", "helicopter", "wrench", "rose", "car"]


@pytest.mark.parametrize("noun", AN)
def test_article_an(noun: str) -> None:
    assert noun in class_table()
    assert with_article(noun) == f"an {noun}"


@pytest.mark.parametrize("noun", A)
def test_article_a(noun: str) -> None:
    assert noun in class_table()
    assert with_article(noun) == f"a {noun}"


PLURALS = {
    "apple": "apples",
    "bus": "buses",
    "knife": "knives",
    "scarf": "scarves",
    "mouse": "mice",
    "tooth": "teeth",
    "sheep": "sheep",
    "deer": "deer",
    "tropical fish": "tropical fish",
    "maple leaf": "maple leaves",
    "strawberry": "strawberries",
    "butterfly": "butterflies",
    "trophy": "trophies",
    "torch": "torches",
    "church": "churches",
    "fox": "foxes",
    "wolf": "wolves",
    "cactus": "cactuses",
    "octopus": "octopuses",
    "hippopotamus": "hippopotamuses",
    "tomato": "tomatoes",
    "mosquito": "mosquitoes",
    "volcano": "volcanoes",
    "burrito": "burritos",
    "flamingo": "flamingos",
    "piano": "pianos",
    "yo-yo": "yo-yos",
    "kangaroo": "kangaroos",
    "ferris wheel": "ferris wheels",
    "wine glass": "wine glasses",
    "glass of milk": "glasses of milk",
    "box of popcorn": "boxes of popcorn",
    "stack of pancakes": "stacks of pancakes",
    "bar of soap": "bars of soap",
    "four-leaf clover": "four-leaf clovers",
    "flip-flop": "flip-flops",
    "compass": "compasses",
    "toothbrush": "toothbrushes",
}


@pytest.mark.parametrize("noun", PLURALS)
def test_plural(noun: str) -> None:
    assert noun in class_table()
    assert plural(noun) == PLURALS[noun]


def test_nouns_are_singular() -> None:
    # Singular nouns that end in s.
    singular = {
        "abacus", "bus", "cactus", "compass", "cutlass", "dress", "hippopotamus", "hourglass",
        "lotus", "magnifying glass", "octopus", "rhinoceros", "stack of pancakes", "wine glass",
        "portion of chips",
    }  # fmt: skip
    assert {name for name in class_table() if name.endswith("s")} <= singular


def test_number_words() -> None:
    assert [number_word(n) for n in range(6)] == ["zero", "one", "two", "three", "four", "five"]


def test_stored_inflections_are_those_of_inflect() -> None:
    """Also of number words. Without inflect, whose import takes 2 seconds in every process."""
    english, stored = classes._english(), classes._inflections()
    expected = {
        name: (str(english.a(name)), str(english.plural_noun(name))) for name in class_table()
    }
    assert stored == expected
    words = [str(english.number_to_words(str(n))) for n in range(len(classes.NUMBER_WORDS))]
    assert list(classes.NUMBER_WORDS) == words
    assert (with_article("owl nest"), plural("owl nest"), number_word(21)) == (
        "an owl nest",
        "owl nests",
        "twenty-one",
    )


def test_scenes_are_asked_about_without_inflect() -> None:
    code = (
        "import sys; sys.modules['inflect'] = None\n"
        "from mmmamba_evals.scenes import questions\n"
        "from mmmamba_evals.scenes.classes import class_table, number_word, plural, with_article\n"
        "for name in class_table(): with_article(name), plural(name)\n"
        "print(number_word(8))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("eight\n", 0), done.stderr
