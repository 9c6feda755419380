"""Yes/no questions: MME and POPE, each by the rules of two kits.

The kits parse answers differently; each function names its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.chance import YES_NO_CHANCE, YES_NO_PAIR_CHANCE, f1_chance
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, safe_divide, strata_of, sum_by_unit
from mmmamba_cli.evaluate.scoring.vqa import strip_punctuation

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
REASONING = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
# The range of Chinese characters in the MME tool.
CHINESE = re.compile(r"[\u4e00-\u9fa5]")

ReadAnswer = Callable[[str], str | None]


def read_words(answer: str) -> str | None:
    """VLMEvalKit: yes or no if exactly one of the two words occurs, else None (its "Unknown").

    Asterisks are not stripped, so `**Yes**` does not match. The kit's change of May 2025 to full
    stops after digits does not affect the words yes and no.
    Source: open-compass/VLMEvalKit, vlmeval/dataset/utils/yorn.py.
    """
    words = strip_punctuation(answer.lower()).split()
    yes, no = "yes" in words, "no" in words
    if yes == no:
        return None
    return "yes" if yes else "no"


def read_first_letters(answer: str) -> str | None:
    """InternVL's kit for MME: yes or no if it occurs in the first four characters, else None.

    Chinese yes and no, and true and false, are mapped to yes and no first; other Chinese characters
    are dropped. Source: OpenGVLab/InternVL, internvl_chat/eval/mme/{eval,calculation}.py.
    """
    text = answer.replace("\n", "")
    for theirs, ours in (("不是", "no"), ("是", "yes"), ("否", "no")):
        text = text.replace(theirs, ours)
    text = text.lower().replace("true", "yes").replace("false", "no")
    start = CHINESE.sub("", text)[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None


def read_denial(answer: str) -> str:
    """InternVL's kit for POPE: no if the first sentence has the word No, no or not, else yes.

    `Nope`, `Not sure` and an empty answer count as yes.
    Source: OpenGVLab/InternVL, internvl_chat/eval/pope/eval_pope.py.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_words(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """MME as VLMEvalKit scores it."""
    return _mme(rows, answers, read_words)


def mme_first_letters(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """MME as its authors' tool scores it, which InternVL's kit uses."""
    return _mme(rows, answers, read_first_letters)


def _mme(rows: Sequence[Row], answers: Sequence[str], read: ReadAnswer) -> UnitScores:
    """Accuracy x 100 + share of pictures with both questions right x 100, summed over categories.

    Perception has 10 categories (at most 2000), reasoning 4 (at most 800). `read_rows` has checked
    that rows come in pairs.
    """
    said = [read(answer) for answer in answers]
    hits = np.array([s == row.answer.lower() for s, row in zip(said, rows, strict=True)])
    units = [row.unit for row in rows]
    names = list(dict.fromkeys(row.category for row in rows))
    column = {name: i for i, name in enumerate(names)}
    numbers = np.zeros((len(rows), len(names), 4))
    for i, row in enumerate(rows):
        numbers[i, column[row.category], :2] = hits[i], 1
    summed, unit_names = sum_by_unit(units, numbers.reshape(len(rows), -1))
    pairs = summed.reshape(len(unit_names), len(names), 4)
    pairs[..., 2] = (pairs[..., 0] == pairs[..., 1]) & (pairs[..., 1] > 0)
    pairs[..., 3] = pairs[..., 1] > 0

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        parts = sums.reshape(*sums.shape[:-1], len(names), 4)
        scores = 100 * (
            safe_divide(parts[..., 0], parts[..., 1]) + safe_divide(parts[..., 2], parts[..., 3])
        )
        found = {}
        for total, wanted in (("perception", PERCEPTION), ("reasoning", REASONING)):
            asked = [column[name] for name in wanted if name in column]
            found[total] = (
                scores[..., asked].sum(-1) if asked else np.full(scores.shape[:-1], np.nan)
            )
        return found

    unknown = tuple(row.index for s, row in zip(said, rows, strict=True) if s is None)
    return UnitScores(
        numbers=summed,
        metrics=metrics,
        strata=strata_of(units, [row.category for row in rows], unit_names),
        counts=_counts(hits, len(unknown)),
        categories={name: _mme_category(pairs[:, column[name]].sum(0)) for name in sorted(names)},
        unreadable=unknown,
        notes=_missing_categories(names),
        chance={
            total: (YES_NO_CHANCE + YES_NO_PAIR_CHANCE) * asked
            for total, wanted in (("perception", PERCEPTION), ("reasoning", REASONING))
            if (asked := sum(name in column for name in wanted))
        },
    )


def _mme_category(sums: np.ndarray) -> dict[str, float]:
    hits, rows, both, pairs = map(float, sums)
    accuracy, plus = 100 * hits / rows, 100 * both / pairs
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy+": plus, "rows": int(rows)}


def _missing_categories(names: Sequence[str]) -> tuple[str, ...]:
    notes = []
    for total, wanted in (("perception", PERCEPTION), ("reasoning", REASONING)):
        lacking = [name for name in wanted if name not in names]
        if len(lacking) == len(wanted):
            notes.append(f"{total} has no value: none of its {len(wanted)} categories was asked")
        elif lacking:
            there = f"{len(wanted) - len(lacking)} of its {len(wanted)} categories"
            notes.append(f"{total} is the sum of {there}, without {', '.join(lacking)}")
    strangers = sorted(set(names) - {*PERCEPTION, *REASONING})
    if strangers:
        notes.append(f"not one of MME's categories, so in no sum: {', '.join(strangers)}")
    return tuple(notes)


def pope_all_rows(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """POPE as VLMEvalKit scores it: F1 x 100 over all rows.

    A row in several splits counts once in each. An unparsed answer is wrong in the accuracy, and
    counts as no in F1, precision and recall.
    """
    said = [read_words(answer) for answer in answers]
    return _pope(rows, said, mean_of_splits=False)


def pope_mean_of_splits(rows: Sequence[Row], answers: Sequence[str]) -> UnitScores:
    """POPE as InternVL's kit scores it: the mean of the splits' F1, x 100."""
    return _pope(rows, [read_denial(answer) for answer in answers], mean_of_splits=True)


def _pope(rows: Sequence[Row], said: Sequence[str | None], *, mean_of_splits: bool) -> UnitScores:
    labels = [[part.strip() for part in row.category.split(",")] for row in rows]
    splits = sorted({part for parts in labels for part in parts})
    column = {name: i for i, name in enumerate(splits)}
    numbers = np.zeros((len(rows), len(splits), 5))
    for i, (row, answer) in enumerate(zip(rows, said, strict=True)):
        true, claimed = row.answer.lower() == "yes", answer == "yes"
        one = (true and claimed, claimed and not true, true and not claimed)
        for part in labels[i]:
            numbers[i, column[part]] = (*one, answer == row.answer.lower(), 1)
    summed, names = sum_by_unit([row.unit for row in rows], numbers.reshape(len(rows), -1))

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        parts = sums.reshape(*sums.shape[:-1], len(splits), 5)
        whole = _f1_and_more(parts.sum(-2))
        if mean_of_splits:
            return {**whole, "F1": _f1_and_more(parts)["F1"].mean(-1)}
        return whole

    unknown = tuple(row.index for s, row in zip(said, rows, strict=True) if s is None)
    right = np.array([s == row.answer.lower() for s, row in zip(said, rows, strict=True)])
    each = numbers.sum(0)
    return UnitScores(
        numbers=summed,
        metrics=metrics,
        strata=strata_of([r.unit for r in rows], [",".join(parts) for parts in labels], names),
        counts=_counts(right, len(unknown)),
        categories={
            name: {
                **{key: float(value) for key, value in _f1_and_more(each[column[name]]).items()},
                "rows": int(each[column[name], 4]),
            }
            for name in splits
        },
        unreadable=unknown,
        chance=_pope_chance(each, mean_of_splits),
    )


def _pope_chance(sums: np.ndarray, mean_of_splits: bool) -> dict[str, float]:
    """Expected metrics of random guesses, from the sums of each split (splits, 5)."""
    # True positives and false negatives are the rows whose right answer is yes.
    yes, asked = sums[:, 0] + sums[:, 2], sums[:, 4]
    whole = f1_chance(float(yes.sum() / asked.sum()))
    if mean_of_splits:
        splits = [f1_chance(float(share))["F1"] for share in yes / asked]
        return {**whole, "F1": sum(splits) / len(splits)}
    return whole


def _f1_and_more(parts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of sums (..., 5): true and false positives, false negatives, right, rows."""
    true, false, missed, right, rows = (parts[..., i] for i in range(5))
    precision, recall = safe_divide(true, true + false), safe_divide(true, true + missed)
    return {
        "F1": 100 * safe_divide(2 * precision * recall, precision + recall),
        "accuracy": 100 * safe_divide(right, rows),
        "precision": 100 * precision,
        "recall": 100 * recall,
    }


def _counts(right: np.ndarray, unreadable: int) -> dict[str, int]:
    hits = int(right.sum())
    return {"right": hits, "wrong": len(right) - hits - unreadable, "unreadable": unreadable}
