"""Batches, background encoding, out of memory, the answer cache and resuming."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preloaded_process import PreloadedProcess
from suite_tables import ScriptedModel, mme_rows, picture, pope_rows, write_tsv

from mmmamba_cli.errors import CheckpointError, DataError, MmmambaError, RunError
from mmmamba_cli.evaluate import (
    EncodedPrompt,
    EvalCallbacks,
    EvalOptions,
    EvalPrompt,
    OutOfMemory,
    evaluate_model,
    evaluator,
    find_suite,
    fingerprint,
    open_suite,
)
from mmmamba_cli.evaluate.answer_cache import AnswerCache, AnswerRecord
from mmmamba_cli.evaluate.batching import BatchLimit, plan_batches
from mmmamba_cli.evaluate.fingerprint import code_digest, library_versions
from mmmamba_cli.evaluate.runner import _answer_batch
from mmmamba_cli.evaluate.tables import remarks

MME = find_suite("mme")


def run(
    data: Path,
    folder: Path,
    model: ScriptedModel,
    watch: EvalCallbacks | None = None,
    **options: Any,
) -> Any:
    chosen = EvalOptions(data=data, **options)
    table, rows = open_suite(MME, chosen)
    return evaluate_model(model, MME, table, rows, folder, chosen, watch or EvalCallbacks())


def right(index: str) -> str:
    return "Yes" if int(index) % 2 == 0 else "No"


def scripted(**options: Any) -> ScriptedModel:
    return ScriptedModel(lambda prompt: right(prompt.index), **options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_tsv(tmp_path / "data" / "MME.tsv", mme_rows())
    return tmp_path / "data"


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


class Dies(ScriptedModel):
    """Ends its process in the middle of a batch."""

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        if len(self.batches) == 3:
            os._exit(9)
        return super().generate(batch, max_new_tokens)


def answer_and_die() -> None:
    data, out = map(Path, sys.argv[1:])
    run(data, out, Dies(lambda prompt: right(prompt.index), most_columns=500), batch=8)


def files(folder: Path) -> dict[str, bytes]:
    """All files except the timing."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "timing.json"}


def test_killed_and_resumed_gives_the_same_files(data: Path, tmp_path: Path) -> None:
    whole = scripted(most_columns=500)
    run(data, tmp_path / "whole", whole, batch=8)
    words = [str(data), str(tmp_path / "killed")]
    process = PreloadedProcess(answer_and_die, words, tmp_path / "output")
    assert process.wait() == 9, process.text()
    (file,) = (tmp_path / "killed").glob("predictions-*.jsonl")
    assert file.read_text().count("prediction") == 12
    # The last line is incomplete.
    with file.open("ab") as handle:
        handle.write(b'{"index": "5", "predic')
    warned: list[str] = []
    rest = scripted(most_columns=500)
    run(data, tmp_path / "killed", rest, EvalCallbacks(warn=warned.append), batch=8)
    assert warned == [f"{file}: the last line was cut short and is dropped"]
    assert rest.batches == whole.batches[3:]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_partly_answered_batch_is_repeated(data: Path, tmp_path: Path) -> None:
    whole = scripted()
    run(data, tmp_path / "out", whole, batch=8)
    (file,) = (tmp_path / "out").glob("predictions-*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: 2 + 8 + 3]))
    rest = scripted()
    seen: list[int] = []
    run(data, tmp_path / "out", rest, EvalCallbacks(advance=seen.append), batch=8)
    assert rest.batches == whole.batches[1:]
    assert sum(seen) == 56
    assert file.read_text() == "".join(lines)


def test_each_setting_has_its_own_cache(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for model, options in (
        (scripted(), {}),
        (scripted(), {"max_tiles": 2}),
        (scripted(), {"max_new_tokens": 3}),
        (scripted(), {"by_likelihood": True}),
        (scripted(), {"limit": 8}),
        (scripted(name="other"), {}),
    ):
        run(data, out, model, **options)
        assert sum(map(len, model.batches)) == options.get("limit", 56)
    write_tsv(data / "MME.tsv", mme_rows()[:28])
    changed = scripted()
    run(data, out, changed)
    assert len(changed.asked) == 28
    assert len(list(out.glob("predictions-*.jsonl"))) == 7


def with_files(data: Path) -> Path:
    """Write the table with picture files; return the first file."""
    rows = mme_rows()
    for row in rows:
        cell = row.pop("image")
        if len(cell) > 64:
            file = data / row["image_path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(cell))
    write_tsv(data / "MME.tsv", rows)
    return data / rows[0]["image_path"]


def test_changed_picture_files_invalidate_the_cache(data: Path, tmp_path: Path) -> None:
    file = with_files(data)
    first = run(data, tmp_path / "out", scripted()).result
    again = scripted()
    assert run(data, tmp_path / "out", again).result == first
    assert again.asked == []
    os.utime(file, (1, 1))
    run(data, tmp_path / "out", again)
    assert again.asked == []
    file.write_bytes(base64.b64decode(picture(77)))
    said: list[str] = []
    changed = run(data, tmp_path / "out", again, EvalCallbacks(say=said.append)).result
    assert len(again.asked) == 56
    assert changed.data.pictures != first.data.pictures
    (old,) = [
        f for f in sorted((tmp_path / "out").glob("predictions-*.jsonl")) if f.name in said[0]
    ]
    assert said == [
        f"answers kept in {old.name} are not taken, all are asked again: pictures changed since"
    ]
    # Pictures of rows outside the limit do not matter.
    few = run(data, tmp_path / "few", scripted(), limit=2).result
    (data / mme_rows()[-1]["image_path"]).write_bytes(b"another picture")
    assert run(data, tmp_path / "few", scripted(), limit=2).result == few


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("code_digest", lambda: "other code", "code"),
        ("library_versions", lambda: {"mmmamba": "99"}, "versions"),
    ],
)
def test_changed_code_or_versions_invalidate_the_cache(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, key: str
) -> None:
    first = run(data, tmp_path / "out", scripted()).result
    assert first.settings["code"] == code_digest()
    assert first.versions == library_versions()
    monkeypatch.setattr(evaluator, name, value)
    model, said = scripted(), list[str]()
    result = run(data, tmp_path / "out", model, EvalCallbacks(say=said.append)).result
    assert len(model.asked) == 56
    assert said[0].endswith(f": {key} changed since")
    assert (result.settings["code"], result.versions) == (
        evaluator.code_digest(),
        evaluator.library_versions(),
    )


def test_another_rule_uses_the_cache(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", scripted())
    suite = MME.model_copy(update={"rules": {"internvl": "mme_first_letters"}})
    model = scripted()
    options = EvalOptions(data=data)
    table, rows = open_suite(suite, options)
    found = evaluate_model(model, suite, table, rows, tmp_path / "out", options, EvalCallbacks())
    assert (model.asked, list(found.unit_scores)) == ([], ["internvl"])


def test_every_file_left_out_of_the_code_digest_exists() -> None:
    folder = Path(fingerprint.__file__).parent
    assert [name for name in fingerprint.NOT_DIGESTED if not (folder / name).exists()] == []
    package = folder.parent
    assert [room for room in fingerprint.DIGESTED_ROOMS if not (package / room).is_dir()] == []


def test_code_digest_covers_inference_code_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(fingerprint.__file__).parents[1]
    copy = tmp_path / "mmmamba_cli"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "__file__", str(copy / "evaluate" / "fingerprint.py"))

    def digest() -> str:
        fingerprint.code_digest.cache_clear()
        return fingerprint.code_digest()

    before = digest()
    assert len(before) == 16
    for file in ("evaluate/scoring/vqa.py", "evaluate/tables.py", "cli/eval.py"):
        with (copy / file).open("a") as handle:
            handle.write("# More.\n")
        assert digest() == before, file
    for file in ("evaluate/prompts.py", "processing/chat_template.py", "model/decoder.py"):
        with (copy / file).open("a") as handle:
            handle.write("# More.\n")
        assert digest() != before, file
        before = digest()
    fingerprint.code_digest.cache_clear()


def test_choices_by_likelihood(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "out", scripted(), by_likelihood=True).result
    assert result.rules[0].metrics["perception"] == 2000.0
    (file,) = (tmp_path / "out").glob("predictions-*.jsonl")
    record = json.loads(file.read_text().splitlines()[2])
    assert sorted(record["log_likelihoods"]) == [-1.0, 0.0]


def store(folder: Path, warned: list[str] | None = None) -> AnswerCache:
    return AnswerCache(folder, {"model": "m"}, (warned if warned is not None else []).append)


def test_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    with store(tmp_path) as kept:
        kept.add([AnswerRecord("1", "Yes"), AnswerRecord("2", "是\u2028\n")])
        file = kept.file
    with store(tmp_path) as kept:
        assert kept.answers["2"].text == "是\u2028\n"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"{nothing\n" + lines[2])
    with pytest.raises(DataError, match="line 2 is damaged"), store(tmp_path):
        pass
    file.write_bytes(b'{"answers_to": {"model": "another"}}\n')
    with (
        pytest.raises(DataError, match="does not say that its answers are to this"),
        store(tmp_path),
    ):
        pass


def test_truncated_header_starts_a_new_cache(tmp_path: Path) -> None:
    warned: list[str] = []
    with store(tmp_path) as kept:
        file = kept.file
    file.write_bytes(file.read_bytes()[:-5])
    with store(tmp_path, warned) as kept:
        kept.add([AnswerRecord("1", "Yes")])
    assert len(warned) == 1
    with store(tmp_path, warned) as kept:
        assert list(kept.answers) == ["1"]
    assert len(warned) == 1


def test_cache_is_locked(tmp_path: Path) -> None:
    with (
        store(tmp_path),
        pytest.raises(RunError, match="being written by another mmmamba command"),
        store(tmp_path),
    ):
        pass


def test_nan_likelihoods_are_an_error(data: Path, tmp_path: Path) -> None:
    """max() of scores with NaN would always be the first choice."""

    class Broken(ScriptedModel):
        def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
            return [[float("nan")] * len(one.prompt.choices) for one in batch]

    prompt = EvalPrompt("7", "q", (), choices=("A", "B"))
    with pytest.raises(CheckpointError, match="row 7: the model scores the choices as nan, nan"):
        _answer_batch(Broken(lambda prompt: "A"), [EncodedPrompt(prompt, 1)], 4)
