"""Short answers: TextVQA's soft accuracy and GQA's exact match, in the versions of both kits.

Answers are normalized (punctuation, numbers, articles, contractions) as in the evaluation of the
VQA challenge (GT-Vision-Lab/VQA), which both kits copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, accuracy_scores
from mmmamba_cli.evaluate.vlmeval_table import split_cell

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The VQA evaluation and its copies drop a full stop that no digit follows. Since May 2025
# VLMEvalKit also keeps a full stop after a digit.
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOP_2025_05 = re.compile(r"(?<!\d)\.(?!\d)")
# The original passes re.UNICODE (32) as `count`, which limits the full stops removed.
MAX_FULL_STOPS = 32

COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = {**{word: str(number) for number, word in enumerate(COUNTED)}, "none": "0"}
ARTICLES = frozenset({"a", "an", "the"})

# Each is also recognized with one of its apostrophes missing.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
APOSTROPHE = "'"


def _missing_one() -> dict[str, str]:
    table = {"somebody'd": "somebodyd"}  # reversed in the original too
    for word in CONTRACTED.split():
        for place in (i for i, letter in enumerate(word) if letter == APOSTROPHE):
            table[word[:place] + word[place + 1 :]] = word
    return table


CONTRACTIONS = _missing_one()


def strip_punctuation(text: str, full_stop: re.Pattern[str] = FULL_STOP_2025_05) -> str:
    """Drop punctuation next to a space, replace other punctuation by a space, drop full stops.

    If a comma is between two digits, all punctuation is dropped. `full_stop` matches the full stops
    to drop.
    """
    found = text
    drop_all = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        at_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if at_space or drop_all else " ")
    return full_stop.sub("", found, count=MAX_FULL_STOPS)


def plain_words(text: str) -> str:
    """Lower-case, map number words to digits, drop articles, restore contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_answer(text: str, full_stop: re.Pattern[str] = FULL_STOP_2025_05) -> str:
    """Normalize as VLMEvalKit does (vlmeval/dataset/utils/vqa_eval.py)."""
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    return plain_words(strip_punctuation(flat, full_stop))


def vqa_answer_2024_01(text: str) -> str:
    """Normalize as VLMEvalKit did before May 2025."""
    return vqa_answer(text, FULL_STOP)


def evalai_answer(text: str) -> str:
    """Normalize as InternVL's kit does (internvl_chat/eval/vqa/textvqa_eval.py).

    Drops commas and question marks first, and separates 's.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(text, FULL_STOP)


def vqa_words_2025_05(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Soft accuracy against the human answers, as VLMEvalKit scores TextVQA since May 2025."""
    return _soft(rows, answers, vqa_answer)


def vqa_words_2024_01(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """As VLMEvalKit scored TextVQA before May 2025: no full stop after a digit is kept."""
    return _soft(rows, answers, vqa_answer_2024_01)


def vqa_evalai(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Soft accuracy with InternVL's normalization."""
    return _soft(rows, answers, evalai_answer)


def _soft(rows: Sequence[Row], answers: Sequence[str], prepare: Callable[[str], str]) -> UnitScores:
    points = [
        soft_accuracy(prepare(answer), [prepare(text) for text in split_cell(row.answer)])
        for row, answer in zip(rows, answers, strict=True)
    ]
    return accuracy_scores(points, [row.unit for row in rows], [row.category for row in rows])


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """The VQA accuracy (Antol et al., arXiv 1505.00468).

    The mean, over leaving out one human answer, of min(1, matching answers / 3). With a single
    human answer it is 0, as in the kits.
    """
    agreeing = sum(one == answer for one in people)
    agreed = sum(min(1.0, (agreeing - (one == answer)) / 3) for one in people)
    return agreed / len(people)


def exact_plain(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Exact match without case and outer spaces, as VLMEvalKit scores GQA."""
    return _exact(rows, answers, lambda text: text.strip().lower())


def exact_gqa(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """Exact match without final full stops and case, as InternVL's kit and the official tool.

    Source: OpenGVLab/InternVL, internvl_chat/eval/vqa/convert_gqa_for_eval.py.
    """
    return _exact(rows, answers, lambda text: text.rstrip(".").lower())


def _exact(
    rows: Sequence[Row], answers: Sequence[str], prepare: Callable[[str], str]
) -> UnitScores:
    points = [
        float(prepare(answer) in {one.strip().lower() for one in split_cell(row.answer)})
        for row, answer in zip(rows, answers, strict=True)
    ]
    return accuracy_scores(points, [row.unit for row in rows], [row.category for row in rows])
