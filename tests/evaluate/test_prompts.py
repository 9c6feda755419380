"""Prompts of the suites, word for word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from suite_tables import picture, write_tsv

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import (
    EvalOptions,
    EvalPrompt,
    find_suite,
    open_suite,
    published_rows,
    suite_names,
)
from mmmamba_cli.evaluate.prompts import build_eval_prompt
from mmmamba_cli.evaluate.scoring import find_rule
from mmmamba_cli.evaluate.suite import parse_suite

WORD = "Answer the question using a single word or phrase."
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."


def asked(folder: Path, suite: str, by_likelihood: bool = False, **cells: Any) -> EvalPrompt:
    """The prompt of a single row of a suite's table."""
    found = find_suite(suite)
    row = {"index": 1, "image": picture(1), "question": "Q?", "answer": "A", **cells}
    row = {**dict.fromkeys(found.columns, ""), **row}
    write_tsv(folder / f"{found.dataset}.tsv", [row])
    table, rows = open_suite(found, EvalOptions(data=folder))
    return build_eval_prompt(rows[0], found, table, max_tiles=None, by_likelihood=by_likelihood)


def test_mme_appends_without_a_space(tmp_path: Path) -> None:
    suite = find_suite("mme")
    question = "Is it red? Please answer yes or no."
    rows = [
        {
            "index": i,
            "image": picture(1) if i == 0 else "0",
            "question": question,
            "answer": "Yes",
            "category": "OCR",
        }
        for i in (0, 1)
    ]
    write_tsv(tmp_path / "MME.tsv", rows)
    table, found = open_suite(suite, EvalOptions(data=tmp_path))
    prompt = build_eval_prompt(found[1], suite, table, max_tiles=None, by_likelihood=True)
    assert prompt.text == f"<image>\n{question}{WORD}"
    assert (prompt.max_tiles, prompt.choices) == (6, ("Yes", "No"))
    assert (
        build_eval_prompt(found[1], suite, table, max_tiles=3, by_likelihood=False).max_tiles == 3
    )


def test_pope(tmp_path: Path) -> None:
    prompt = asked(
        tmp_path,
        "pope",
        question="Is there a dog in the image? Please answer yes or no.",
        answer="Yes",
    )
    assert prompt.text == f"<image>\nIs there a dog in the image?\n{WORD}"
    assert prompt.max_tiles == 6


@pytest.mark.parametrize("suite", ["mmbench", "seed", "scienceqa"])
def test_multiple_choice(tmp_path: Path, suite: str) -> None:
    prompt = asked(tmp_path, suite, True, A="one", B="two", C="", hint="Mind this.")
    assert prompt.text == f"<image>\nMind this.\nQ?\nA. one\nB. two\n{LETTER_INSTRUCTION}"
    assert (prompt.max_tiles, prompt.choices) == (6, ("A", "B"))


def test_multiple_choice_in_chinese(tmp_path: Path) -> None:
    prompt = asked(tmp_path, "mmbench", question="这是什么？", A="猫", B="dog")
    assert prompt.text == "<image>\n这是什么？\nA. 猫\nB. dog\n请直接回答选项字母。"


def test_mmmu_with_and_without_options(tmp_path: Path) -> None:
    one = asked(tmp_path, "mmmu", question="See <image 1>?", A="x", B="y", split="validation")
    assert one.text == f"<image>\nSee <image 1>?\nA. x\nB. y\n{LETTER_INSTRUCTION}"
    assert (one.max_tiles, one.pictures[0].enlarge) == (12, 2)
    open_one = asked(tmp_path, "mmmu", True, question="How many?", answer="3", split="validation")
    assert open_one.text == "<image>\nHow many?\nAnswer the question directly."
    assert open_one.choices == ()


def test_several_pictures(tmp_path: Path) -> None:
    cells = {"image": str([picture(i) for i in range(7)]), "split": "validation"}
    prompt = asked(tmp_path, "mmmu", question="Compare <image 1> and <image 7>.", A="x", **cells)
    lines = "".join(f"Image-{i}: <image>\n" for i in range(1, 8))
    assert prompt.text == f"{lines}Compare <Image-1> and <Image-7>.\nA. x\n{LETTER_INSTRUCTION}"
    assert [one.enlarge for one in prompt.pictures] == [2, 1, 1, 1, 1, 1, 1]
    # At most 64 tiles in all.
    assert prompt.max_tiles == 9


@pytest.mark.parametrize("suite", ["textvqa", "gqa"])
def test_short_answers(tmp_path: Path, suite: str) -> None:
    assert asked(tmp_path, suite).text == f"<image>\nQ?\n{WORD}"


def test_mmvet_question_is_unchanged(tmp_path: Path) -> None:
    assert asked(tmp_path, "mmvet").text == "<image>\nQ?"


def test_shipped_suites_name_existing_rules() -> None:
    assert suite_names() == [
        "gqa",
        "mmbench",
        "mme",
        "mmmu",
        "mmvet",
        "pope",
        "scenes",
        "scenes-long",
        "scenes-long-4k",
        "scenes-long-v1",
        "scenes-unseen",
        "scienceqa",
        "seed",
        "textvqa",
    ]
    (table,) = published_rows()
    for name in suite_names():
        suite = find_suite(name)
        assert all(find_rule(rule) for rule in suite.rules.values())
        if suite.published is not None:
            assert suite.published.rule in suite.rules
            for values in table["rows"].values():
                assert suite.published.column in values
    assert set(find_suite("mme").rules) == set(find_suite("pope").rules)


def test_published_rows_match_the_papers() -> None:
    (table,) = published_rows()
    assert table["source"] == "mmMamba, arXiv 2502.13145"
    assert table["rows"]["HoVLE 2.6B"] == {
        "MME-P": 1433.5,
        "MMB": 71.9,
        "POPE": 87.6,
        "SEED": 70.7,
        "MMMU": 33.7,
        "MM-Vet": 44.3,
        "TextVQA": 66.0,
        "SQA-I": 94.8,
        "GQA": 60.9,
    }
    assert table["rows"]["mmMamba-linear"]["SQA-I"] == 79.2
    assert table["rows"]["mmMamba-hybrid (8 attention)"]["MMB"] == 63.7


def test_unknown_suite_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no suite is called mmebench: .* did you mean mmbench\?"):
        find_suite("mmebench")


def test_invalid_suite() -> None:
    text = "{name: x, version: 1, dataset: X, columns: [], unite: row}"
    unknown = r"unite: unknown key, .*; did you mean unit\?"
    with pytest.raises(
        DataError, match=f"x.yaml is no suite: title: is missing, must be some text; {unknown}"
    ):
        parse_suite(text, "x.yaml")
    text = "{name: x, title: X, version: 1, dataset: X, columns: index, rules: {a: 3}}"
    with pytest.raises(
        DataError,
        match=r"columns: is 'index', must be a list, each some text; rules.a: is 3, must be some t",
    ):
        parse_suite(text, "x.yaml")
    with pytest.raises(DataError, match=r"x.yaml is no suite: is null, must be a section with the"):
        parse_suite("", "x.yaml")
    with pytest.raises(DataError, match="not valid YAML"):
        parse_suite("{", "x.yaml")
