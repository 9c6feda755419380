"""Question templates; a wording is chosen independently of the answer."""

from __future__ import annotations

from random import Random

from mmmamba_evals.scenes.classes import number_word, plural, with_article

YES, NO = "Yes", "No"
YES_OR_NO = " Please answer yes or no."

# The phrase for one picture and for several.
ONE_PICTURE, ANY_PICTURE = "the picture", "any of the pictures"

EXISTENCE = ("Is there {a} in {where}?", "Can you see {a} in {where}?", "Is {a} shown in {where}?")
COUNT_ONE = ("Is there exactly one {noun} in {where}?", "Does {where} show exactly one {noun}?")
COUNT_MANY = (
    "Are there exactly {number} {nouns} in {where}?",
    "Does {where} show exactly {number} {nouns}?",
)
POSITION = ("Is the {one} {side} the {other}?", "Is the {one} {side} the {other} in {where}?")
COLOUR = ("Is the {noun} {colour}?", "Is the {noun} in {where} {colour}?")
WRITTEN = (
    'Is the word "{word}" written in {where}?',
    'Does {where} say "{word}"?',
)
LIST_ALL = "List the objects from left to right."
LIST_ONE = "List the objects in picture {number} from left to right."
HOW_MANY = "How many {nouns} are there in {where}?"
WHICH_COLOUR = "What colour is the {noun}?"
WHICH_WORD = "What word is written in {where}?"
SPELL = "Spell the word in {where}."
READ = "Read the words from top to bottom."
ACROSS = "Is the {one} left or right of the {other}?"
UPRIGHT = "Is the {one} above or below the {other}?"
WHERE_IS = "Where in {where} is the {noun}?"

# Cells of a 3 x 3 grid over the picture, by row and column.
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
SIDES = ("to the left of", "to the right of", "above", "below")
# The sides as answers.
SIDE_NAMES = ("left", "right", "above", "below")


def ask_existence(rng: Random, name: str, where: str = ONE_PICTURE) -> str:
    return rng.choice(EXISTENCE).format(a=with_article(name), where=where) + YES_OR_NO


def ask_count(rng: Random, name: str, number: int, where: str = ONE_PICTURE) -> str:
    forms = COUNT_ONE if number == 1 else COUNT_MANY
    text = rng.choice(forms).format(
        noun=name, nouns=plural(name), number=number_word(number), where=where
    )
    return text[0].upper() + text[1:] + YES_OR_NO


def ask_position(rng: Random, one: str, side: str, other: str) -> str:
    return (
        rng.choice(POSITION).format(one=one, side=side, other=other, where=ONE_PICTURE) + YES_OR_NO
    )


def ask_colour(rng: Random, name: str, colour: str) -> str:
    return rng.choice(COLOUR).format(noun=name, colour=colour, where=ONE_PICTURE) + YES_OR_NO


def ask_word(rng: Random, word: str) -> str:
    return rng.choice(WRITTEN).format(word=word, where=ONE_PICTURE) + YES_OR_NO


def ask_to_list(number: int) -> str:
    """For one of several pictures, counted from 1."""
    return LIST_ONE.format(number=number)


def ask_how_many(name: str) -> str:
    return HOW_MANY.format(nouns=plural(name), where=ONE_PICTURE)


def ask_which_colour(name: str) -> str:
    return WHICH_COLOUR.format(noun=name)


def ask_which_word() -> str:
    return WHICH_WORD.format(where=ONE_PICTURE)


def ask_to_spell() -> str:
    return SPELL.format(where=ONE_PICTURE)


def ask_side(one: str, side: str, other: str) -> tuple[str, str]:
    """The question for the side along its axis, and the answer if it is `side`."""
    form = ACROSS if side in SIDES[:2] else UPRIGHT
    return form.format(one=one, other=other), SIDE_NAMES[SIDES.index(side)]


def ask_where(name: str) -> str:
    return WHERE_IS.format(noun=name, where=ONE_PICTURE)
