"""UTF-8 byte order marks, written by editors on Windows, are skipped in every text file."""

from __future__ import annotations

import codecs
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ended import Command
from small_language_models import write, write_tokenizer
from suite_tables import pope_rows, write_tsv

import mmmamba_cli
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.cli.chat_session import ChatSession
from mmmamba_cli.data import open_corpus
from mmmamba_cli.evaluate import EvalOptions, find_suite, library, open_suite
from mmmamba_cli.evaluate.predictions import read_predictions
from mmmamba_cli.evaluate.result import read_result
from mmmamba_cli.recipe import dump_recipe, load_recipe
from mmmamba_cli.runs import Run, open_processor
from mmmamba_cli.seed.fidelity import read_calibration

TALK = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


def mark(file: Path) -> Path:
    content = file.read_bytes()
    assert not content.startswith(codecs.BOM_UTF8)
    file.write_bytes(codecs.BOM_UTF8 + content)
    return file


def test_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    file = tmp_path / "mine.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(mark(file)) == recipe


def test_conversations_and_a_meta_file(tmp_path: Path) -> None:
    lines = tmp_path / "talk.jsonl"
    lines.write_text(f"{json.dumps(TALK)}\n{json.dumps(TALK)}\n")
    assert len(open_corpus(mark(lines))) == 2
    assert open_corpus(lines)[0].messages[0]["content"] == "Hi"
    # A first line of only the mark is blank.
    blank = tmp_path / "blank.jsonl"
    blank.write_text(f"\n{json.dumps(TALK)}\n")
    assert len(open_corpus(mark(blank))) == 1
    meta = tmp_path / "meta.json"
    entry = {"root": "", "annotation": "talk.jsonl", "repeat_time": 1, "length": 2}
    meta.write_text(json.dumps({"talk": entry}))
    assert len(open_corpus(mark(meta))) == 2


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    write(folder, "Llama", {"eos_token_id": 2, "pad_token_id": 0})
    write_tokenizer(folder)
    return folder


def test_a_checkpoint_with_its_tokenizer(language_model: Path) -> None:
    plain = open_checkpoint(language_model)
    expected = open_processor(plain)
    assert expected is not None
    marked = [mark(file).name for file in sorted(language_model.glob("*.j*"))]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(marked)
    found = open_checkpoint(language_model)
    assert found.config.to_dict() == plain.config.to_dict()
    processor = open_processor(found)
    assert processor is not None
    assert processor.text_ids("the cat sat") == expected.text_ids("the cat sat")
    assert processor.to_dict() == expected.to_dict()


def test_questions_for_calibration(language_model: Path, tmp_path: Path) -> None:
    processor = open_processor(open_checkpoint(language_model))
    file = tmp_path / "questions.jsonl"
    # A Unicode line separator is text and does not end a JSON line.
    lines = [{"question": "the cat"}, {"question": "sat\u2028on the mat"}]
    file.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    assert len(read_calibration(mark(file), processor).input_ids) == 2


def test_a_table_of_questions(tmp_path: Path) -> None:
    suite = find_suite("pope")
    file = write_tsv(tmp_path / "POPE.tsv", pope_rows())
    _, rows = open_suite(suite, EvalOptions(data=tmp_path))
    mark(file)
    table, found = open_suite(suite, EvalOptions(data=tmp_path))
    assert found == rows
    assert table.image_cell("0")


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_answers(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"answers.{kind}"
    separator = {"tsv": "\t", "csv": ","}.get(kind)
    if separator is None:
        file.write_text('{"index": 1, "prediction": "Yes"}\n')
    else:
        file.write_text(f"index{separator}prediction\n1{separator}Yes\n")
    assert read_predictions(mark(file)).cells == [{"index": "1", "prediction": "Yes"}]


def test_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(str(library._suite_files()["pope"]), tmp_path / "pope.yaml")
    mark(tmp_path / "pope.yaml")
    expected = find_suite("pope")
    monkeypatch.setattr(library, "_suite_files", lambda: {"pope": tmp_path / "pope.yaml"})
    assert find_suite("pope") == expected


def test_a_run_and_a_result(language_model: Path, tmp_path: Path, mmmamba: Command) -> None:
    run = tmp_path / "run"
    assert mmmamba("seed", language_model, "--no-report", "--run", run).code == 0
    expected = Run(run).products()
    for file in (run / "run.json", run / "products/seed/manifest.json"):
        mark(file)
    assert Run(run).products() == expected
    file = tmp_path / "result.json"
    value: dict[str, Any] = {
        "suite": "x",
        "title": "X",
        "version": 1,
        "suite_digest": "x",
        "data": {"file": "x", "sha256": "x", "rows": 1, "used": 1},
        "model": {"name": "x", "content_hash": "x"},
        "settings": {},
        "rules": [],
        "seed": 0,
        "versions": {},
    }
    file.write_text(json.dumps(value))
    assert read_result(mark(file)).suite == "x"


def test_questions_from_a_pipe(
    language_model: Path, mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ChatSession, "ask", lambda talk, question: asked.append(question))
    typed = codecs.BOM_UTF8 + b"the cat\nsat\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    done = mmmamba("chat", "--model", language_model, "--device", "cpu")
    assert (done.code, asked) == (0, ["the cat", "sat"]), done.err


# Modules that read files of the system or of the project itself.
PLAIN = {
    "devices.py",
    "distill/stage_runner.py",
    "doctor/environment.py",
    "profiling/timers.py",
    "plugins.py",
    "export/remote_code.py",
}
READING = re.compile(r'(read_text\(|\.open\()encoding="utf-8"(?!.*"[aw]")')


def plain_readers() -> Iterator[str]:
    package = Path(mmmamba_cli.__file__).parent
    for file in sorted(package.rglob("*.py")):
        name = str(file.relative_to(package))
        if name not in PLAIN and READING.search(file.read_text(encoding="utf-8")):
            yield name


def test_readers_of_user_text_skip_the_mark() -> None:
    assert list(plain_readers()) == [], 'read text that users may edit with encoding="utf-8-sig"'
