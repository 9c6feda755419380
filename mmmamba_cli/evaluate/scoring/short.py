"""Short free answers: TextVQA's soft accuracy and GQA's exact match, each as both kits have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.tally import Tally, accuracy_tally
from mmmamba_cli.evaluate.scoring.words import evalai_answer, vqa_answer, vqa_answer_2024_01
from mmmamba_cli.evaluate.tsv import split_cell


def vqa_words_2025_05(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """Soft accuracy over the people's answers, as VLMEvalKit scores TextVQA since May 2025."""
    return _soft(rows, answers, vqa_answer)


def vqa_words_2024_01(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """The same, as VLMEvalKit scored it before May 2025: no full stop stays behind a digit."""
    return _soft(rows, answers, vqa_answer_2024_01)


def vqa_evalai(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """The same, answers prepared as InternVL's kit does it."""
    return _soft(rows, answers, evalai_answer)


def _soft(rows: Sequence[Row], answers: Sequence[str], prepare: Callable[[str], str]) -> Tally:
    points = [
        soft_accuracy(prepare(answer), [prepare(text) for text in split_cell(row.answer)])
        for row, answer in zip(rows, answers, strict=True)
    ]
    return accuracy_tally(points, [row.unit for row in rows], [row.category for row in rows])


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean, over leaving out one person, of min(1, people who gave this answer / 3).

    The VQA evaluation's measure (Antol et al., arXiv 1505.00468). With one person only there is
    nobody left to agree with, so the measure is 0, as the kits have it.
    """
    agreeing = sum(one == answer for one in people)
    agreed = sum(min(1.0, (agreeing - (one == answer)) / 3) for one in people)
    return agreed / len(people)


def exact_plain(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """Exact match but for case and outer spaces, as VLMEvalKit scores GQA."""
    return _exact(rows, answers, lambda text: text.strip().lower())


def exact_gqa(rows: Sequence[Row], answers: Sequence[str]) -> Tally:
    """Exact match after dropping final full stops and case: InternVL's kit and the official tool.

    Source: OpenGVLab/InternVL, internvl_chat/eval/vqa/convert_gqa_for_eval.py.
    """
    return _exact(rows, answers, lambda text: text.rstrip(".").lower())


def _exact(rows: Sequence[Row], answers: Sequence[str], prepare: Callable[[str], str]) -> Tally:
    points = [
        float(prepare(answer) in {one.strip().lower() for one in split_cell(row.answer)})
        for row, answer in zip(rows, answers, strict=True)
    ]
    return accuracy_tally(points, [row.unit for row in rows], [row.category for row in rows])
