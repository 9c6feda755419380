"""Several processes answer a suite: the files of a single one, resuming, errors and stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_mme import MME, files, right, run, scripted
from suite_tables import ScriptedModel, mme_rows, picture, write_tsv
from thread_group import ThreadGroup, run_in_group

from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.evaluate import (
    EncodedPrompt,
    EvalCallbacks,
    EvalOptions,
    EvalStopped,
    evaluate_model,
    open_suite,
)
from mmmamba_cli.evaluate.result import ScoredSuite


def run_all(
    data: Path,
    folder: Path,
    models: Sequence[ScriptedModel],
    watch: EvalCallbacks | None = None,
    **options: Any,
) -> list[Any]:
    """`run` with one process for each model; `watch` is that of process 0."""
    chosen = EvalOptions(data=data, **options)

    def work(group: ThreadGroup) -> ScoredSuite:
        table, rows = open_suite(MME, chosen)
        own = (watch if group.is_main else None) or EvalCallbacks()
        return evaluate_model(models[group.rank], MME, table, rows, folder, chosen, own, group)

    return run_in_group(len(models), work)


def timing(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "timing.json").read_text())
    return {name: found[name] for name in ("answered", "batches", "largest_batch", "halved")}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({}, {"batch": 5}),
        ({"columns": 1_000}, {}),
        ({"most_columns": 500}, {"batch": 32}),
        ({"columns": 10_000, "most_columns": 2_000}, {}),
        ({}, {"by_likelihood": True}),
    ],
    ids=["given", "measured", "given too large", "measured too large", "likelihood"],
)
def test_files_are_those_of_a_single_process(
    data: Path, tmp_path: Path, size: int, model: dict[str, Any], options: dict[str, Any]
) -> None:
    alone = scripted(**model)
    warned: list[str] = []
    run(data, tmp_path / "one", alone, EvalCallbacks(warn=warned.append), **options)
    models = [scripted(**model) for _ in range(size)]
    seen: list[int] = []
    again: list[str] = []
    watch = EvalCallbacks(warn=again.append, advance=seen.append)
    results = run_all(data, tmp_path / "all", models, watch, **options)
    assert {type(result) for result in results} == {ScoredSuite}
    assert files(tmp_path / "all") == files(tmp_path / "one")
    assert timing(tmp_path / "all") == timing(tmp_path / "one")
    assert (again, sum(seen)) == (warned, 56)
    # Only a batch that did not fit makes others be asked again.
    asked = [batch for one in models for batch in one.batches]
    assert {*map(tuple, alone.batches)} <= {*map(tuple, asked)}
    if "most_columns" not in model:
        assert sorted(asked) == sorted(alone.batches)
        counts = [len(one.batches) for one in models]
        assert max(counts) - min(counts) <= 1


def test_rows_that_cannot_be_asked_are_those_of_a_single_process(tmp_path: Path) -> None:
    rows = mme_rows()
    rows[4]["image"] = "!" + picture(4)
    for place in (8, 12, 30):
        # Truncated pixels: only the process that decodes the picture notices.
        rows[place]["image"] = rows[place]["image"][:-80]
        rows[place]["question"] += " " * place
    write_tsv(tmp_path / "MME.tsv", rows)
    alone = run(tmp_path, tmp_path / "one", scripted(), batch=4).result
    results = run_all(tmp_path, tmp_path / "all", [scripted() for _ in range(3)], batch=4)
    assert len(alone.not_asked) == 8
    assert [one.result for one in results] == [alone] * 3
    assert files(tmp_path / "all") == files(tmp_path / "one")


class Fails(ScriptedModel):
    """Raises an error in its third batch."""

    error: BaseException = RuntimeError("no more")

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        if len(self.batches) == 2:
            raise self.error
        return super().generate(batch, max_new_tokens)


def failing(error: BaseException) -> Fails:
    model = Fails(lambda prompt: right(prompt.index))
    model.error = error
    return model


@pytest.mark.parametrize("later", [1, 2, 4])
def test_resumed_on_another_number_of_processes(data: Path, tmp_path: Path, later: int) -> None:
    run(data, tmp_path / "one", scripted(), batch=4)
    broken = failing(RuntimeError("no more"))
    run_all(data, tmp_path / "all", [scripted(), scripted(), broken], batch=4)
    (file,) = (tmp_path / "all").glob("predictions-*.jsonl")
    # Two steps of three batches.
    assert file.read_text().count("prediction") == 2 * 3 * 4
    assert not (tmp_path / "all" / "result.json").exists()
    models = [scripted() for _ in range(later)]
    run_all(data, tmp_path / "all", models, batch=4)
    assert sum(len(one.asked) for one in models) == 56 - 24
    assert files(tmp_path / "all") == files(tmp_path / "one")


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_one_process_is_raised_on_all_and_reported_once(
    data: Path, tmp_path: Path, rank: int
) -> None:
    models = [scripted(), scripted()]
    models[rank] = failing(CheckpointError("its weights are bad", "read them again"))
    errors = run_all(data, tmp_path / "out", models, batch=4)
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert (error.message, error.hint) == ("its weights are bad", "read them again")
    reported = [not error.is_reported_elsewhere for error in errors]
    assert reported == [number == rank for number in range(2)]


def test_stop_on_one_process_stops_all_after_the_batch(data: Path, tmp_path: Path) -> None:
    models = [scripted(), scripted()]

    def work(group: ThreadGroup) -> ScoredSuite:
        options = EvalOptions(data=data, batch=4)
        table, rows = open_suite(MME, options)
        stops = EvalCallbacks(is_stopped=lambda: len(models[1].batches) == 3)
        own = EvalCallbacks() if group.is_main else stops
        place = tmp_path / "out"
        return evaluate_model(models[group.rank], MME, table, rows, place, options, own, group)

    assert [type(one) for one in run_in_group(2, work)] == [EvalStopped] * 2
    (file,) = (tmp_path / "out").glob("predictions-*.jsonl")
    assert file.read_text().count("prediction") == 3 * 2 * 4
    run(data, tmp_path / "out", scripted(), batch=4)
    run(data, tmp_path / "one", scripted(), batch=4)
    assert files(tmp_path / "out") == files(tmp_path / "one")


def test_processes_with_different_tables_are_refused(data: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "other" / "MME.tsv", mme_rows()[:-2])

    def work(group: ThreadGroup) -> ScoredSuite:
        options = EvalOptions(data=data if group.is_main else tmp_path / "other")
        table, rows = open_suite(MME, options)
        own, place = EvalCallbacks(), tmp_path / "out"
        return evaluate_model(scripted(), MME, table, rows, place, options, own, group)

    errors = run_in_group(2, work)
    assert [type(error) for error in errors] == [DataError] * 2
    assert "process 1 has a model, suite, table or version other than process 0" in str(errors[0])
    assert [getattr(error, "is_reported_elsewhere", None) for error in errors] == [False, True]
    assert not (tmp_path / "out").exists()
