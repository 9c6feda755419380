"""Every scoring rule against hand-written tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.bootstrap import intervals
from mmmamba_cli.evaluate.result import rule_result
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.score_retention import retention
from mmmamba_cli.evaluate.scoring import NEWEST, RULES, find_rule
from mmmamba_cli.evaluate.scoring.choices import (
    SINCE_2024_02,
    SINCE_2025_08,
    SINCE_2026_06,
    ChoiceRule,
    choose_option,
)
from mmmamba_cli.evaluate.scoring.vqa import (
    evalai_answer,
    soft_accuracy,
    vqa_answer,
    vqa_answer_2024_01,
)
from mmmamba_cli.evaluate.scoring.yes_no import (
    PERCEPTION,
    REASONING,
    read_denial,
    read_first_letters,
    read_words,
)

# Answer, and the result of VLMEvalKit, the MME tool, and InternVL for POPE.
YES_NO = [
    ("Yes", "yes", "yes", "yes"),
    ("yes.", "yes", "yes", "yes"),
    ("No", "no", "no", "no"),
    ("NO", "no", "no", "yes"),
    ("no, it is not.", "no", "no", "no"),
    ("Nope", None, "no", "yes"),
    ("**Yes**", None, None, "yes"),
    ("**No**", None, "no", "yes"),
    ("Y", None, None, "yes"),
    ("N", None, None, "yes"),
    ("Not sure", None, "no", "yes"),
    ("I am not sure", None, None, "no"),
    ("No, yes", None, "no", "no"),
    ("Yes, no doubt", None, "yes", "no"),
    ("Yes. No doubt.", None, "yes", "yes"),
    ("(yes)", "yes", "yes", "yes"),
    ("There is no dog.", "no", None, "no"),
    ("It is true", None, None, "yes"),
    ("True", None, "yes", "yes"),
    ("False.", None, "no", "yes"),
    ("", None, None, "yes"),
    (" ", None, None, "yes"),
    ("是", None, "yes", "yes"),
    ("是的，有一只狗", None, "yes", "yes"),
    ("不是", None, "no", "yes"),
    ("否", None, "no", "yes"),
    ("没有", None, None, "yes"),
    ("Yes\nNo", None, "yes", "yes"),
    ("know", None, "no", "yes"),
    ("Eyes", None, "yes", "yes"),
]


@pytest.mark.parametrize(("answer", "words", "letters", "denial"), YES_NO)
def test_yes_and_no(answer: str, words: str | None, letters: str | None, denial: str) -> None:
    assert read_words(answer) == words
    assert read_first_letters(answer) == letters
    assert read_denial(answer) == denial


def mme_pair(category: str, number: int) -> list[Row]:
    unit = f"{category}: {number}"
    return [
        Row(f"{unit} a", "?", "Yes", category, unit=unit),
        Row(f"{unit} b", "?", "No", category, unit=unit),
    ]


def test_mme_sums() -> None:
    rows = [row for name in (*PERCEPTION, *REASONING) for i in (0, 1) for row in mme_pair(name, i)]
    # All right: 200 points for each of 10 and 4 categories.
    right = find_rule("mme_words")(rows, [row.answer for row in rows])
    assert right.values() == {"perception": 2000.0, "reasoning": 800.0}
    assert len(right.categories) == 14
    assert right.counts == {"right": 56, "wrong": 0, "unreadable": 0}
    # Always yes: half of the questions right, no picture with both right.
    yes = find_rule("mme_words")(rows, ["Yes"] * len(rows))
    assert yes.values() == {"perception": 500.0, "reasoning": 200.0}


def test_mme_by_both_rules() -> None:
    rows = [*mme_pair("OCR", 0), *mme_pair("OCR", 1), *mme_pair("code_reasoning", 0)]
    answers = ["Yes", "No", "Yes", "Nope", "True", "Not sure"]
    # OCR: 3 of 4 right, 1 of 2 pairs; code reasoning: nothing is parsed.
    words = find_rule("mme_words")(rows, answers)
    assert words.values() == {"perception": 125.0, "reasoning": 0.0}
    assert words.categories["OCR"] == {
        "score": 125.0,
        "accuracy": 75.0,
        "accuracy+": 50.0,
        "rows": 4,
    }
    assert words.counts == {"right": 3, "wrong": 0, "unreadable": 3}
    assert words.unreadable == ("OCR: 1 b", "code_reasoning: 0 a", "code_reasoning: 0 b")
    assert len(words.notes) == 2
    assert words.notes[1] == (
        "reasoning is the sum of 1 of its 4 categories, without commonsense_reasoning, "
        "numerical_calculation, text_translation"
    )
    letters = find_rule("mme_first_letters")(rows, answers)
    assert letters.values() == {"perception": 200.0, "reasoning": 200.0}


def test_mme_unknown_categories_are_in_no_sum() -> None:
    rows = [*mme_pair("OCR", 0), *mme_pair("taste", 0)]
    tally = find_rule("mme_words")(rows, ["Yes", "No", "Yes", "No"])
    # No question on reasoning gives no value, not 0.
    assert tally.values() == {"perception": 200.0, "reasoning": None}
    assert "reasoning has no value: none of its 4 categories was asked" in tally.notes
    assert "taste" in tally.notes[-1]
    assert set(intervals(tally)) == {"perception"}


def test_headline_is_the_first_metric_with_rows() -> None:
    rows = mme_pair("code_reasoning", 0)
    tally = find_rule("mme_words")(rows, ["Yes", "No"])
    assert (tally.headline, tally.values()) == (
        "reasoning",
        {"perception": None, "reasoning": 200.0},
    )
    part = rule_result("vlmevalkit", "mme_words", tally, {}, seed=0)
    assert (part.metric, part.metrics["perception"]) == ("reasoning", None)
    assert '"perception": null' in part.model_dump_json(indent=1)
    kept = retention("mme", "vlmevalkit", ("student", tally), ("teacher", tally), 2, seed=0)
    assert (kept.metric, kept.ratio) == ("reasoning", 1.0)


def pope(split: str, answer: str, number: int) -> Row:
    return Row(str(number), "?", answer, split, unit=f"picture {number % 2}")


def test_pope_by_both_rules() -> None:
    rows = [
        pope("random", "Yes", 0),
        pope("random", "Yes", 1),
        pope("random", "No", 2),
        pope("random", "No", 3),
        pope("popular", "Yes", 4),
        pope("popular", "No", 5),
    ]
    answers = ["Yes", "Nope", "Yes", "No", "Yes", "No"]
    # VLMEvalKit: the unknown one counts as no. TP 2, FP 1, FN 1, 4 of 6 right.
    words = find_rule("pope_all_rows")(rows, answers)
    found = words.values()
    assert next(iter(found)) == "F1"
    assert found == pytest.approx(
        {"F1": 200 / 3, "accuracy": 400 / 6, "precision": 200 / 3, "recall": 200 / 3}
    )
    assert words.categories["popular"]["F1"] == 100.0
    # Random alone: TP 1, FP 1, FN 1.
    assert words.categories["random"] == pytest.approx(
        {"F1": 50.0, "accuracy": 50.0, "precision": 50.0, "recall": 50.0, "rows": 4}
    )
    assert words.counts == {"right": 4, "wrong": 1, "unreadable": 1}
    # InternVL: "Nope" is yes. Random: TP 2, FP 1, so F1 is 80; popular 100; the mean is 90.
    denial = find_rule("pope_mean_of_splits")(rows, answers)
    assert denial.values()["F1"] == pytest.approx(90.0)
    assert denial.categories["random"]["F1"] == pytest.approx(80.0)
    assert denial.counts["unreadable"] == 0


def test_pope_unparsed_answer_is_wrong_even_if_no_is_right() -> None:
    rows = [pope("random", "Yes", 0), pope("random", "No", 1)]
    found = find_rule("pope_all_rows")(rows, ["Yes", "maybe"]).values()
    assert (found["F1"], found["accuracy"]) == (100.0, 50.0)


def test_pope_row_in_two_splits_counts_in_both() -> None:
    rows = [pope("random,popular", "Yes", 0), pope("popular", "No", 1)]
    tally = find_rule("pope_all_rows")(rows, ["Yes", "Yes"])
    # Over three rows: TP 2, FP 1.
    assert tally.values()["F1"] == pytest.approx(80.0)
    assert {name: one["rows"] for name, one in tally.categories.items()} == {
        "popular": 2,
        "random": 1,
    }


def test_pope_without_yes_is_zero() -> None:
    rows = [pope("random", "Yes", 0), pope("random", "No", 1)]
    for rule in ("pope_all_rows", "pope_mean_of_splits"):
        assert find_rule(rule)(rows, ["No", "No"]).values()["F1"] == 0.0


KIT_ANSWERS = [
    json.loads(line)
    for line in (Path(__file__).parent / "kit_answers.jsonl").read_text("utf-8").split("\n")
    if line
]
VERSIONS: dict[str, ChoiceRule] = {
    "2026-06": SINCE_2026_06,
    "2025-08": SINCE_2025_08,
    "2024-02": SINCE_2024_02,
}


def test_recorded_answers_are_parsed_as_by_the_kits() -> None:
    """`kit_answers.jsonl` has the results of the kits' functions, by version."""
    assert len(KIT_ANSWERS) == 707
    wrong = []
    for one in KIT_ANSWERS:
        answer = one["answer"]
        ours = {
            "choice": {
                since: choose_option(answer, one["options"], rule)
                for since, rule in VERSIONS.items()
            },
            "vqa": {"2025-05": vqa_answer(answer), "2024-01": vqa_answer_2024_01(answer)},
            "yes_no": read_words(answer),
            "mme": read_first_letters(answer),
            "evalai": evalai_answer(answer),
            "pope": read_denial(answer),
        }
        for key in ours.keys() & one.keys():
            if ours[key] != one[key]:
                wrong.append((key, answer, one["options"], ours[key], one[key]))
    assert wrong == []


def test_versions_of_a_rule_differ_on_recorded_answers() -> None:
    def differing(key: str, one: str, other: str) -> int:
        return sum(row[key][one] != row[key][other] for row in KIT_ANSWERS)

    assert differing("choice", "2026-06", "2025-08") == 18
    assert differing("choice", "2025-08", "2024-02") > 70
    assert differing("vqa", "2025-05", "2024-01") == 50


def test_name_without_date_is_the_newest_version() -> None:
    for name, newest in NEWEST.items():
        assert find_rule(name) is RULES[newest]
        versions = [rule for rule in RULES if rule.startswith(f"{name}_20")]
        assert newest == max(versions) and len(versions) > 1


WORDS = [
    # Answer, and its normal form in VLMEvalKit and in InternVL's kit.
    ("The Cat", "cat", "cat"),
    ("Two birds.", "2 birds", "2 birds"),
    ("none", "0", "0"),
    ("dont", "don't", "don't"),
    ("couldntve", "couldntve", "couldntve"),
    ("couldnt've", "couldn't've", "couldn't've"),
    ("1,000", "1000", "1000"),
    ("3.5", "3.5", "3.5"),
    ("yes!", "yes", "yes"),
    ("a-b", "b", "b"),
    ("x-y", "x y", "x y"),
    ("x- y", "x y", "x y"),
    ("John's", "john's", "john 's"),
    ("red, green", "red green", "red green"),
    ("red,green", "red green", "redgreen"),
    ("\tnew\nline ", "new line", "new line"),
    ("", "", ""),
]


@pytest.mark.parametrize(("answer", "plain", "evalai"), WORDS)
def test_vqa_normalization(answer: str, plain: str, evalai: str) -> None:
    assert vqa_answer(answer) == plain
    assert evalai_answer(answer) == evalai


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_soft_accuracy_of_ten_answers(agreeing: int, expected: float) -> None:
    people = ["x"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert soft_accuracy("x", people) == pytest.approx(expected)


def test_textvqa_by_both_rules() -> None:
    people = str(["john's"] * 9 + ["jack"])
    rows = [Row("0", "?", people, unit="0"), Row("1", "?", str(["2"] * 10), unit="1")]
    answers = ["Johns", "two"]
    assert find_rule("vqa_words")(rows, answers).values() == {"accuracy": 50.0}
    assert find_rule("vqa_words")(rows, ["John's", "two"]).values() == {"accuracy": 100.0}
    assert find_rule("vqa_evalai")(rows, ["John 's", "two"]).values() == {"accuracy": 100.0}


def test_textvqa_before_and_since_may_2025() -> None:
    rows = [Row("0", "?", str(["5"] * 10), unit="0"), Row("1", "?", str(["5."] * 10), unit="1")]
    answers = ["5.", "5."]
    assert find_rule("vqa_words_2025_05")(rows, answers).values() == {"accuracy": 50.0}
    assert find_rule("vqa_words_2024_01")(rows, answers).values() == {"accuracy": 100.0}
    assert find_rule("vqa_evalai")(rows, answers).values() == {"accuracy": 100.0}


def test_gqa_by_both_rules() -> None:
    rows = [Row(str(i), "?", "dog", unit=str(i)) for i in range(4)]
    answers = ["Dog", "dog.", " dog", "a dog"]
    assert find_rule("exact_gqa")(rows, answers).values() == {"accuracy": 50.0}
    assert find_rule("exact_plain")(rows, answers).values() == {"accuracy": 50.0}
    assert find_rule("exact_gqa")(rows[:2], answers[:2]).values() == {"accuracy": 100.0}


def test_rule_of_another_package() -> None:
    module = "mmmamba_cli.evaluate.scoring.yes_no"
    assert find_rule(f"{module}:mme_words") is RULES["mme_words"]
    with pytest.raises(
        DataError,
        match="no scoring rule is called mme_word, known are mme_words, .*"
        r"did you mean mme_words\?",
    ):
        find_rule("mme_word")
    with pytest.raises(DataError, match="cannot be imported"):
        find_rule(f"{module}:nothing")
