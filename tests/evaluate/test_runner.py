"""Batches, background encoding, out of memory and rows that cannot be asked."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_mme import run, scripted
from suite_tables import ScriptedModel, mme_rows, picture, pope_rows, write_tsv

from mmmamba_cli.errors import CheckpointError, DataError, MmmambaError
from mmmamba_cli.evaluate import (
    EncodedPrompt,
    EvalCallbacks,
    EvalOptions,
    EvalPrompt,
    OutOfMemory,
    evaluate_model,
    find_suite,
    open_suite,
)
from mmmamba_cli.evaluate.batching import BatchLimit, plan_batches
from mmmamba_cli.evaluate.runner import _answer_batch
from mmmamba_cli.evaluate.tables import remarks


@given(
    st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9), st.sampled_from([0, 20, 60, 999])
)
def test_plan_has_every_prompt_once_within_the_limit(
    lengths: list[int], prompts: int, columns: int
) -> None:
    plan = plan_batches(lengths, BatchLimit(prompts, columns))
    assert sorted(place for batch in plan for place in batch) == list(range(len(lengths)))
    found = [lengths[place] for batch in plan for place in batch]
    assert found == sorted(lengths, reverse=True)
    for batch in plan:
        assert 1 <= len(batch) <= prompts
        wide = len(batch) * max(lengths[place] for place in batch)
        assert len(batch) == 1 or not columns or wide <= columns


def test_batches_are_maximal() -> None:
    lengths = [5, 5, 5, 5, 2, 2, 2, 2, 2]
    assert plan_batches(lengths, BatchLimit(4, 10)) == [[0, 1], [2, 3], [4, 5, 6, 7], [8]]


def test_background_encoding_and_batches_by_length(data: Path, tmp_path: Path) -> None:
    model = scripted()
    run(data, tmp_path / "out", model, batch=8)
    assert all(name != "MainThread" for name in model.threads)
    assert [len(batch) for batch in model.batches] == [8] * 7
    lengths = [len(prompt.text) for prompt in model.asked]
    assert lengths == sorted(lengths, reverse=True)


def test_progress_counts_every_answer_once(data: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    run(data, tmp_path / "out", scripted(), EvalCallbacks(advance=seen.append))
    assert sum(seen) == 56
    again: list[int] = []
    model = scripted()
    run(data, tmp_path / "out", model, EvalCallbacks(advance=again.append))
    assert (again, model.asked) == ([56], [])


def test_out_of_memory_halves_with_one_warning(data: Path, tmp_path: Path) -> None:
    warned: list[str] = []
    model = scripted(most_columns=500)
    watch = EvalCallbacks(warn=warned.append)
    result = run(data, tmp_path / "out", model, watch, batch=32).result
    assert result.rules[0].metrics == {"perception": 2000.0, "reasoning": 800.0}
    assert len(warned) == 1
    assert "a batch of 32 prompts did not fit" in warned[0]
    # 32, 16 and 8 of about 100 letters are too wide, 4 are not.
    assert [len(batch) for batch in model.batches] == [4] * 14
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    assert (timing["halved"], timing["largest_batch"], timing["answered"]) == (3, 4, 56)


def test_measured_batches_are_halved_too(data: Path, tmp_path: Path) -> None:
    model = scripted(columns=10_000, most_columns=2_000)
    said: list[str] = []
    run(data, tmp_path / "out", model, EvalCallbacks(say=said.append))
    assert said == ["batches of up to 10,000 tokens fit: 64 of the longest prompts"]
    sizes = [len(batch) for batch in model.batches]
    assert sum(sizes) == 56
    assert max(sizes) > 8
    assert all(len(batch) * 125 <= 4_000 for batch in model.batches)


def test_single_prompt_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    said = r"one prompt of .* tokens does not fit .*--max-tiles"
    with pytest.raises(MmmambaError, match=said):
        run(data, tmp_path / "out", scripted(most_columns=10), batch=2)

    class Full(ScriptedModel):
        def max_batch_tokens(self, longest: EncodedPrompt, max_new_tokens: int) -> int | None:
            raise OutOfMemory("at once")

    with pytest.raises(MmmambaError, match=said):
        run(data, tmp_path / "other", Full({}))


def cut_picture(number: int) -> str:
    """A picture with an intact header and truncated pixels."""
    return base64.b64encode(base64.b64decode(picture(number, (130, 90)))[:-40]).decode()


@pytest.mark.parametrize("options", [{"batch": 8}, {}], ids=["given", "found"])
def test_skipped_rows_are_counted_and_named(tmp_path: Path, options: dict[str, Any]) -> None:
    """Two pictures with damaged headers, and one with truncated pixels in the longest prompts."""
    rows = mme_rows()
    rows[4]["image"] = "!" + picture(4)
    rows[8]["image"] = "AAAA" * 40
    rows[12] |= {"image": cut_picture(12), "question": "Is it so? " * 40}
    write_tsv(tmp_path / "MME.tsv", rows)
    warned: list[str] = []
    seen: list[int] = []
    model = scripted(columns=None if options else 10_000)
    watch = EvalCallbacks(warn=warned.append, advance=seen.append)
    result = run(tmp_path, tmp_path / "out", model, watch, **options).result
    bad = ["4", "5", "8", "9", "12", "13"]
    assert sorted((one.index for one in result.not_asked), key=int) == bad
    assert all(one.reason for one in result.not_asked)
    assert sorted(int(prompt.index) for prompt in model.asked) == [
        index for index in range(56) if str(index) not in bad
    ]
    # Three of 28 pairs are wrong; no answer is unparsed.
    for part in result.rules:
        assert part.counts == {"right": 50, "wrong": len(bad), "unreadable": 0}
    assert result.data.used == 56
    assert sum(seen) == 56
    assert warned == [
        f"6 of 56 rows could not be asked and count as wrong; row {result.not_asked[0].index}: "
        f"{result.not_asked[0].reason}"
    ]
    assert any("6 of 56 rows could not be asked" in text for text in remarks(result))
    # Skipped rows are not cached: once repaired they are asked, and only they.
    write_tsv(tmp_path / "MME.tsv", mme_rows())
    again = scripted()
    mended = run(tmp_path, tmp_path / "out", again, **options).result
    assert mended.not_asked == ()
    assert mended.rules[0].metrics == {"perception": 2000.0, "reasoning": 800.0}


def test_skipped_row_is_wrong_by_every_rule(tmp_path: Path) -> None:
    """InternVL's rule for POPE reads an empty answer as yes, which may be right."""
    rows = pope_rows()
    rows[0]["image"] = "!" + picture(0)
    write_tsv(tmp_path / "POPE.tsv", rows)
    suite, options = find_suite("pope"), EvalOptions(data=tmp_path)
    table, asked = open_suite(suite, options)
    right = {row.index: row.answer for row in asked}
    model = ScriptedModel(right)
    found = evaluate_model(
        model, suite, table, asked, tmp_path / "out", options, EvalCallbacks()
    ).result
    bad = [row["index"] for row in rows if row["image_path"] == "0.jpg"]
    assert [one.index for one in found.not_asked] == [str(index) for index in bad]
    for part in found.rules:
        assert part.counts == {"right": 12 - len(bad), "wrong": len(bad), "unreadable": 0}


def test_no_readable_row_is_an_error(tmp_path: Path) -> None:
    rows = mme_rows()
    for row in rows:
        row["image"] = "AAAA" * 40
    write_tsv(tmp_path / "MME.tsv", rows)
    model = scripted()
    with pytest.raises(DataError, match=r"none of 56 rows can be asked \(0, 1, 2, .* 46 more\)"):
        run(tmp_path, tmp_path / "out", model)
    assert model.asked == []
    assert not (tmp_path / "out" / "result.json").exists()


def test_choices_by_likelihood(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", scripted(), by_likelihood=True).result
    assert result.rules[0].metrics["perception"] == 2000.0
    (file,) = (tmp_path / "out").glob("predictions-*.jsonl")
    record = json.loads(file.read_text().splitlines()[2])
    assert sorted(record["log_likelihoods"]) == [-1.0, 0.0]


def test_nan_likelihoods_are_an_error(data: Path, tmp_path: Path) -> None:
    """max() of scores with NaN would always be the first choice."""

    class Broken(ScriptedModel):
        def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
            return [[float("nan")] * len(one.prompt.choices) for one in batch]

    prompt = EvalPrompt("7", "q", (), choices=("A", "B"))
    with pytest.raises(CheckpointError, match="row 7: the model scores the choices as nan, nan"):
        _answer_batch(Broken(lambda prompt: "A"), [EncodedPrompt(prompt, 1)], 4)
