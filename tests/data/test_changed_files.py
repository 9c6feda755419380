"""Data files that are replaced or written to after they were opened."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from test_tables import write_parquet

from mmmamba_cli.data import (
    StepLoader,
    build_index,
    find_index,
    fingerprint,
    index_file,
    index_key,
    open_corpus,
)
from mmmamba_cli.data.fingerprint import content_digest
from mmmamba_cli.data.jsonl import _index
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import HolisticVLMProcessor

KINDS = ("train.jsonl", "train.json", "train.tar")


def text(number: int, words: str = "") -> dict[str, str]:
    return {"text": f"sample {number}{words}"}


def write(file: Path, words: str = "", samples: int = 4) -> Path:
    """Samples whose positions and contents depend on `words`."""
    records = [text(number, words) for number in range(samples)]
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, records)) + "\n")
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    else:
        with tarfile.open(file, "w") as tar:
            for number, record in enumerate(records):
                member = file.parent / f"{number}.json"
                # Another number of blocks moves the members that follow.
                member.write_text(json.dumps(record) + " " * 300 * len(words))
                tar.add(member, member.name)
                member.unlink()
    return file


@pytest.mark.parametrize("name", KINDS)
def test_positions_of_one_content_get_no_index_of_another(
    name: str, tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    """The file changes between its opening and its first digest, while a processor is loaded."""
    corpus = open_corpus(write(tmp_path / name))
    write(tmp_path / name, " changed")
    for digest in (content_digest, fingerprint, lambda one: index_key(one, processor)):
        with pytest.raises(DataError, match=f"{name} changed after it was opened"):
            digest(corpus)  # type: ignore[operator]
    assert content_digest(open_corpus(tmp_path / name))


def test_a_file_that_changes_between_two_digests(
    tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    """It is written again with as many bytes, and its index is not built."""
    file = write(tmp_path / "train.jsonl")
    corpus = open_corpus(file)
    key = index_key(corpus, processor)
    file.write_text(file.read_text().replace("sample 3", "sample 8"))
    os.utime(file, ns=(1, 1))
    with pytest.raises(DataError, match="changed after it was opened"):
        build_index(corpus, processor, key)


def test_data_that_are_gone(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    file = write(tmp_path / "train.jsonl")
    corpus = open_corpus(file)
    file.unlink()
    with pytest.raises(DataError, match=r"train\.jsonl cannot be read: No such file"):
        index_key(corpus, processor)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("with_index", [False, True])
def test_samples_of_a_file_of_another_size_are_bad(
    name: str, with_index: bool, tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    """No sample is made of bytes at the positions of another file, and none is left out."""
    corpus = open_corpus(write(tmp_path / name))
    index = build_index(corpus, processor, index_key(corpus, processor)) if with_index else None
    options: dict[str, Any] = {"batch_size": 4, "max_length": 50, "index": index}
    loader = StepLoader(corpus, processor, **options)
    assert not loader.step(0).bad
    os.utime(tmp_path / name)
    assert not loader.step(0).bad
    write(tmp_path / name, " changed")
    step = loader.step(0)
    assert len(step.bad) == 4 and not step.micro_batches[0].num_samples
    assert {one.name for one in step.bad} == {corpus.name(number) for number in range(4)}
    assert all("changed after it was opened: it had" in one.reason for one in step.bad)


def test_lines_that_are_appended_while_a_file_is_searched(tmp_path: Path) -> None:
    """The search ends where the file ended when it was opened, in the middle of a line or not."""
    file = write(tmp_path / "train.jsonl")
    corpus: Any = open_corpus(file)
    size = file.stat().st_size
    with file.open("a") as handle:
        handle.write(json.dumps(text(4)) + "\n")
    assert (_index(file, size) == corpus.records.positions).all()
    assert len(_index(file, size + 3)[0]) == 5


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/da\xffta"))
    folder.mkdir()
    file = write(folder / "train.jsonl")
    corpus = open_corpus(file)
    key = index_key(corpus, processor)
    place = index_file(str(file), key)
    place.write_bytes(build_index(corpus, processor, key).to_bytes())
    assert find_index(str(file), corpus, processor).file == place


def test_a_table_that_is_replaced(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", 4)
    corpus = open_corpus(file)
    write_parquet(file, 3)
    with pytest.raises(DataError, match=r"a\.parquet changed after it was opened"):
        content_digest(corpus)


def test_a_folder_that_cannot_be_listed_has_no_index(
    tmp_path: Path, processor: HolisticVLMProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "train.jsonl")

    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    assert find_index(str(file), open_corpus(file), processor).file is None
