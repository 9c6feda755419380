"""Bootstrap intervals: seeded, paired, and as wide as theory predicts."""

from __future__ import annotations

import numpy as np
import pytest

from mmmamba_cli.evaluate.bootstrap import intervals, ratio_interval, resample_counts
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, accuracy_scores


def tally(points: list[float]) -> UnitScores:
    return accuracy_scores(points, [str(i) for i in range(len(points))], [""] * len(points))


def test_every_stratum_keeps_its_size() -> None:
    strata = ["a"] * 7 + ["b"] * 2
    blocks = list(resample_counts(strata, 120, seed=0))
    assert [len(block) for block in blocks] == [50, 50, 20]
    counts = np.concatenate(blocks)
    assert (counts[:, :7].sum(1) == 7).all()
    assert (counts[:, 7:].sum(1) == 2).all()
    assert counts.std() > 0


def test_interval_of_a_share_is_binomial() -> None:
    low, high = intervals(tally([1.0] * 300 + [0.0] * 100), draws=4000)["accuracy"]
    # 75 % of 400: one standard error is 100 x sqrt(0.75 x 0.25 / 400) = 2.165 points.
    assert low == pytest.approx(75 - 1.96 * 2.165, abs=0.4)
    assert high == pytest.approx(75 + 1.96 * 2.165, abs=0.4)


def test_same_seed_gives_same_interval() -> None:
    one = tally([1.0, 0.0] * 30)
    assert intervals(one, seed=1) == intervals(one, seed=1)
    assert intervals(one, seed=1) != intervals(one, seed=2)


def test_pairing_cancels_question_difficulty() -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(600) < 0.5
    teacher = tally([float(e) for e in easy])
    # The student loses one in twenty of the teacher's right answers.
    kept = rng.random(600) < 0.95
    student = tally([float(e and k) for e, k in zip(easy, kept, strict=True)])
    found = ratio_interval(student, teacher, "accuracy")
    assert found is not None
    low, high = found
    ratio = student.values()["accuracy"] / teacher.values()["accuracy"]
    assert low < ratio < high < 1
    # Unpaired, the two scores alone are worth 2 x 1.96 x sqrt(2 x 0.5 / 300), more than 0.2.
    assert high - low < 0.07
    assert ratio_interval(teacher, teacher, "accuracy") == (1.0, 1.0)


def test_ratio_has_no_interval_if_the_teacher_can_score_zero() -> None:
    assert ratio_interval(tally([1.0, 1.0]), tally([1.0, 0.0]), "accuracy") is None


def test_questions_about_one_picture_are_resampled_together() -> None:
    def rows(pictures: int) -> list[Row]:
        return [
            Row(str(i), "?", "Yes", "random", unit=f"picture {i % pictures}") for i in range(400)
        ]

    answers = ["Yes" if i % 4 < 2 else "No" for i in range(400)]
    widths = []
    for pictures in (4, 400):
        found = intervals(find_rule("pope_all_rows")(rows(pictures), answers))["recall"]
        widths.append(found[1] - found[0])
    # Four pictures give a wider interval than four hundred.
    assert widths[0] > 5 * widths[1]


def test_mme_pairs_are_resampled_within_their_category() -> None:
    rows = [
        Row(f"{name}{i}{answer}", "?", answer, name, unit=f"{name} {i}")
        for name in ("OCR", "count")
        for i in range(5)
        for answer in ("Yes", "No")
    ]
    found = find_rule("mme_words")(rows, [row.answer for row in rows])
    assert found.strata == ("OCR",) * 5 + ("count",) * 5
    assert intervals(found)["perception"] == (400.0, 400.0)


def test_scores_of_different_rows_are_rejected() -> None:
    with pytest.raises(ValueError, match="not of the same rows"):
        ratio_interval(tally([1.0]), tally([1.0, 0.0]), "accuracy")
