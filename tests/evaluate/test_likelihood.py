"""Answers by likelihood among candidates: yes and no, options, and answers to other questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite_tables import ScriptedModel, mme_rows, picture, write_tsv

from mmmamba_cli.evaluate import EvalOptions, EvalPrompt, find_suite, open_suite
from mmmamba_cli.evaluate.candidates import find_candidates, reference_answer
from mmmamba_cli.evaluate.evaluator import evaluate_model
from mmmamba_cli.evaluate.interfaces import EncodedPrompt
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.runner import EvalCallbacks
from mmmamba_cli.evaluate.tables import remarks

COLOURS = ("red", "Red", "green", "blue", "violet", "dark red")
GQA = find_suite("gqa")


def question(index: int, answer: str, category: str = "colour", **options: str) -> Row:
    return Row(str(index), "Q?", answer, category, options)


def colours() -> list[Row]:
    rows = [question(i, COLOURS[i % len(COLOURS)]) for i in range(12)]
    return [*rows, question(12, "two", "number"), question(13, "three", "number")]


class HandMadeModel(ScriptedModel):
    """Log-likelihoods from a function of prompt and choice, in nats for the whole choice."""

    def __init__(self, likelihood: Any, name: str = "hand-made"):
        super().__init__(lambda prompt: "generated", name)
        self.likelihood = likelihood

    def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        prompts = [one.prompt for one in batch]
        return [[self.likelihood(prompt, c) for c in prompt.choices] for prompt in prompts]


def gqa_table(folder: Path) -> list[Row]:
    rows = [{"index": i, "question": "Q?", "answer": COLOURS[2 + i % 4]} for i in range(8)]
    write_tsv(folder / "GQA_TestDev_Balanced.tsv", [{**row, "image": picture(1)} for row in rows])
    return open_suite(GQA, EvalOptions(data=folder))[1]


def evaluated(folder: Path, model: ScriptedModel, **options: Any) -> Any:
    chosen = EvalOptions(data=folder, **options)
    suite = GQA if (folder / "GQA_TestDev_Balanced.tsv").exists() else find_suite("mme")
    table, rows = open_suite(suite, chosen)
    out = folder / "out"
    return evaluate_model(model, suite, table, rows, out, chosen, EvalCallbacks()).result


def test_open_answers_are_ranked_against_three_of_their_category() -> None:
    rows = colours()
    found = find_candidates(rows, GQA)
    for row, one in zip(rows, found, strict=True):
        assert one.open and one.right == row.answer and one.right in one.texts
        assert len(one.texts) == 4 and len({text.lower() for text in one.texts}) == 4
        if row.category == "colour":
            assert set(one.texts) <= set(COLOURS)
    # Two answers are too few: colours fill up.
    assert {"two", "three"} < set(found[12].texts) and set(found[12].texts) & set(COLOURS)
    # The right one is not always at the same place, and the order of rows changes nothing.
    assert len({one.texts.index(one.right) for one in found}) > 1
    assert find_candidates(rows[::-1], GQA)[::-1] == found


def test_annotators_of_one_question_are_no_wrong_answers() -> None:
    listed = question(0, "['cat', 'dog', 'Dog ', 'dog', 'cat', 'dog']", "animal")
    assert reference_answer(listed) == "dog"
    others = [question(i, name, "animal") for i, name in enumerate(("cat", "cow", "pig", "ox"), 1)]
    (first, *_) = find_candidates([listed, *others], GQA)
    assert first.right == "dog" and set(first.texts) == {"dog", "cow", "pig", "ox"}


def test_rows_with_options_or_choices_rank_these() -> None:
    with_options = question(1, "B", A="cat", B="dog")
    (one,) = find_candidates([with_options], find_suite("seed"))
    assert (one.texts, one.right, one.open) == (("A", "B"), "B", False)
    (one,) = find_candidates([question(1, "yes")], find_suite("mme"))
    assert (one.texts, one.right, one.open) == (("Yes", "No"), "Yes", False)


def test_a_model_that_knows_all_answers(tmp_path: Path) -> None:
    right = {row.index: row.answer for row in gqa_table(tmp_path)}

    def likelihood(prompt: EvalPrompt, choice: str) -> float:
        # The right answer is the likeliest per byte; a shorter one may be likelier as a whole.
        per_byte = -1.0 if choice == right[prompt.index] else -1.1
        return per_byte * len(choice.encode())

    result = evaluated(
        tmp_path, HandMadeModel(likelihood), by_likelihood=True, open_by_likelihood=True
    )
    (rule,) = result.rules
    assert (rule.rule, rule.scoring) == ("likelihood", "candidate_accuracy")
    assert rule.metrics == {"accuracy": 100.0} and rule.chance == {"accuracy": 25.0}
    assert result.settings["answers"].startswith("chosen by likelihood among answers")
    assert any("not generated" in remark for remark in remarks(result))
    # A part of the rows has the same candidates.
    model = HandMadeModel(lambda prompt, choice: -float(choice != "green"), "green")
    options = {"by_likelihood": True, "open_by_likelihood": True}
    whole = evaluated(tmp_path, model, **options)
    assert whole.rules[0].metrics["accuracy"] == 25.0
    assert evaluated(tmp_path, model, limit=4, **options).data.used == 4


def test_the_default_generates(tmp_path: Path) -> None:
    gqa_table(tmp_path)
    result = evaluated(tmp_path, HandMadeModel(lambda prompt, choice: 0.0))
    assert result.settings["answers"] == "generated"
    assert [rule.rule for rule in result.rules] == ["internvl", "vlmevalkit"]
    # Options are the only ones to choose from with --choose.
    chosen = evaluated(tmp_path, HandMadeModel(lambda prompt, choice: 0.0), by_likelihood=True)
    assert [rule.rule for rule in chosen.rules] == ["internvl", "vlmevalkit"]


def test_yes_and_no_are_scored_by_the_rules_of_the_suite(tmp_path: Path) -> None:
    write_tsv(tmp_path / "MME.tsv", mme_rows())
    model = HandMadeModel(lambda prompt, choice: float(choice == "Yes"))
    result = evaluated(tmp_path, model, by_likelihood=True, open_by_likelihood=True)
    assert result.settings["answers"] == "chosen by likelihood"
    # Always yes: half of the questions, and no pair.
    assert result.rules[0].metrics["perception"] == 500.0
    assert result.rules[0].chance == {"perception": 750.0, "reasoning": 300.0}
