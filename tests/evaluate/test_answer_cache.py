"""The answer cache: resuming, the settings it depends on, and damaged files."""

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
from preloaded_process import PreloadedProcess
from scripted_mme import MME, files, right, run, scripted
from suite_tables import ScriptedModel, mme_rows, picture, write_tsv

from mmmamba_cli.errors import DataError, RunError
from mmmamba_cli.evaluate import (
    EncodedPrompt,
    EvalCallbacks,
    EvalOptions,
    evaluate_model,
    evaluator,
    fingerprint,
    images,
    open_suite,
)
from mmmamba_cli.evaluate.answer_cache import AnswerCache, AnswerRecord
from mmmamba_cli.evaluate.fingerprint import code_digest, library_versions


class Dies(ScriptedModel):
    """Ends its process in the middle of a batch."""

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        if len(self.batches) == 3:
            os._exit(9)
        return super().generate(batch, max_new_tokens)


def answer_and_die() -> None:
    data, out = map(Path, sys.argv[1:])
    run(data, out, Dies(lambda prompt: right(prompt.index), most_columns=500), batch=8)


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


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"index": "2"},
        {"prediction": "Yes"},
        {"index": 2, "prediction": "Yes"},
        {"index": "2", "prediction": None},
        {"index": ["2"], "prediction": "Yes"},
        {"index": "2", "prediction": "\ud800"},
        {"index": "2", "prediction": "Yes", "log_likelihoods": 3},
        {"index": "2", "prediction": "Yes", "log_likelihoods": ["x"]},
        {"index": "1", "prediction": "another"},
        {"limit": 3},
        {"limit": {"prompts": 3, "rows": 2}},
        {"limit": {"prompts": "3"}},
        {"limit": {"prompts": 0}},
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_records_of_wrong_types_are_damage(
    tmp_path: Path, record: dict[str, Any], is_last: bool
) -> None:
    with store(tmp_path) as kept:
        kept.add([AnswerRecord("1", "Yes"), AnswerRecord("3", "No", (0.5, -1.0))])
        file = kept.file
    lines = file.read_bytes().splitlines(keepends=True)
    lines.insert(len(lines) - (not is_last), json.dumps(record).encode() + b"\n")
    file.write_bytes(b"".join(lines))
    number = 4 if is_last else 3
    with pytest.raises(DataError, match=f"line {number} is damaged"), store(tmp_path):
        pass
    assert file.read_bytes() == b"".join(lines)


def test_killed_at_any_byte(data: Path, tmp_path: Path) -> None:
    """The files are those of an undisturbed run, and the scores also with other batches."""
    run(data, tmp_path / "whole", scripted(most_columns=500), batch=8)
    whole = files(tmp_path / "whole")
    (cache,) = (tmp_path / "whole").glob("predictions-*.jsonl")
    content = cache.read_bytes()
    for number, cut in enumerate(range(0, len(content), 199)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / cache.name).write_bytes(content[:cut])
        batch = 8 if number % 2 == 0 else (1, 3, 64)[number % 3]
        run(data, folder, scripted(most_columns=500), batch=batch)
        resumed = files(folder)
        if batch != 8:
            # Its limits of batches are others, and so is the order of answers.
            resumed[cache.name] = content
        assert resumed == whole, (cut, batch)


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


def test_pictures_beside_the_table_come_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder may have other pictures of the same names."""
    file = with_files(data)
    elsewhere = tmp_path / "elsewhere"
    other = elsewhere / file.relative_to(data)
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another picture")
    monkeypatch.chdir(elsewhere)
    name = str(file.relative_to(data))
    assert images._find(data / "MME.tsv", name, "MME", "0") == file
    file.unlink()
    assert images._find(data / "MME.tsv", name, "MME", "0").read_bytes() == b"another picture"
