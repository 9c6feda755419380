"""Tables as training data: Parquet files and folders of `datasets`, if pyarrow is installed."""

from __future__ import annotations

import builtins
import json
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, picture

from mmmamba_cli.data import StepLoader, fingerprint, open_corpus, parse_sample
from mmmamba_cli.data.sample import ImageBytes, read_image
from mmmamba_cli.data.table_corpus import table_files, take_pictures
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor


def png(number: int) -> bytes:
    file = BytesIO()
    picture(24, 16, seed=number).save(file, "PNG")
    return file.getvalue()


def rows(count: int) -> list[dict[str, Any]]:
    """Rows as vision-language sets on the Hub have them: pictures in a list of structs."""
    return [
        {
            "images": [{"bytes": png(number), "path": None}] if number % 2 else None,
            "texts": [
                {"user": "What is it?", "assistant": f"square {number}", "source": "drawn"},
                {"user": "Sure?", "assistant": "Yes.", "source": None},
            ],
        }
        for number in range(count)
    ]


def refused(call: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value


def test_a_row_with_stored_pictures_is_a_sample() -> None:
    record, stored = take_pictures(rows(2)[1])
    sample = parse_sample(record, "a", stored.__getitem__)
    assert [each["content"] for each in sample.messages] == [
        "What is it?",
        "square 1",
        "Sure?",
        "Yes.",
    ]
    (image,) = sample.images
    assert isinstance(image, ImageBytes) and read_image(image) == png(1)
    parts = [{"type": "text", "text": "Hm?", "image": None}, {"type": "image", "text": None}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "So."}]
    record, stored = take_pictures({"image": {"bytes": None, "path": "a.png"}, "messages": said})
    found = parse_sample(record, "b", Path)
    assert not stored and found.images == (Path("a.png"),)
    assert found.messages[0]["content"] == [{"type": "text", "text": "Hm?"}, {"type": "image"}]


def test_pictures_may_be_bytes_and_in_parts() -> None:
    """Of a column of bytes, and of the parts of a content, which may name a file too."""
    said = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "So."}]
    record, stored = take_pictures({"images": [png(0), png(1)], "messages": said})
    found = parse_sample(record, "a", stored.__getitem__)
    assert [read_image(image) for image in found.images] == [png(0), png(1)]  # type: ignore[arg-type]
    shown = (png(2), {"bytes": png(3), "path": "b.png"}, {"bytes": None, "path": "c.png"}, "d.png")
    parts = [{"type": "image", "image": picture, "text": None} for picture in shown]
    row = {"messages": [{"role": "user", "content": parts}, said[1]]}
    record, stored = take_pictures(row)
    found = parse_sample(record, "b", lambda name: stored.get(name, Path(name)))
    images = [read_image(image) for image in found.images]  # type: ignore[arg-type]
    assert images == [png(2), png(3), Path("c.png"), Path("d.png")]
    assert row["messages"][0]["content"][0]["image"] == png(2)  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": {"bytes": 3, "path": 7}}, "image is {'bytes': 3, 'path': 7}, expected a path"),
        ({"image": {"bytes": None, "path": None}}, "image is {}, expected a path"),
        ({"images": [[png(0)]]}, "expected a path"),
        ({"images": [None]}, "image is None, expected a path"),
        ({"conversations": "[]"}, "the turns are a str, expected a list"),
        ({"conversations": None, "texts": [{"user": "a", "assistant": None}]}, "no assistant"),
        ({"conversations": None, "texts": [{"user": None}]}, "pair 1 of texts has no user"),
        ({"conversations": None, "texts": ["a"]}, "has no turns"),
        ({"video": "a.mp4", "fps": float("nan")}, "fps is nan, expected a number above 0"),
        ({"video": "a.mp4", "fps": float("inf")}, "fps is inf, expected a number above 0"),
    ],
)
def test_rows_of_wrong_types(row: dict[str, Any], message: str) -> None:
    said = [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "So."}]
    record, _ = take_pictures({"conversations": said, **row})
    error = refused(lambda: parse_sample(record, "a.parquet:3", Path))
    assert error.message.startswith("a.parquet:3: ") and message in error.message


def test_the_files_of_a_source(tmp_path: Path) -> None:
    names = [f"train-0000{n}-of-00002.parquet" for n in range(2)]
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in table_files(str(tmp_path))] == names
    assert [file.name for file in table_files(f"{tmp_path}/train-*.parquet")] == names
    assert "no file matches" in refused(lambda: table_files(f"{tmp_path}/b-*.parquet")).message
    (tmp_path / "test-00000-of-00001.parquet").touch()
    error = refused(lambda: table_files(str(tmp_path)))
    assert "has the splits test, train" in error.message and "test-*.parquet" in str(error.hint)
    saved = tmp_path / "saved"
    (saved / "train").mkdir(parents=True)
    (saved / "dataset_dict.json").write_text("{}")
    listed = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (saved / "train" / "state.json").write_text(json.dumps(listed))
    assert "has the splits train" in refused(lambda: table_files(str(saved))).message
    (file,) = table_files(str(saved / "train"))
    assert file == saved / "train" / "data-00000-of-00001.arrow"
    (tmp_path / "empty").mkdir()
    assert "without .parquet" in refused(lambda: open_corpus(tmp_path / "empty")).message


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return found(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    error = refused(lambda: open_corpus(tmp_path / "a.parquet"))
    assert "needs pyarrow" in error.message and "mmmamba[tables]" in str(error.hint)


def write_parquet(file: Path, count: int) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow.Table.from_pylist(rows(count)), file, row_group_size=2
    )
    return file


def test_parquet_is_read_by_the_loader(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 5)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 4)
    corpus = pickle.loads(pickle.dumps(open_corpus(tmp_path)))
    assert len(corpus) == 9
    assert corpus.name(5) == "train-00001-of-00002.parquet:1"
    answers = [corpus[index].messages[1]["content"] for index in range(9)]
    assert answers == [f"square {n}" for n in (0, 1, 2, 3, 4, 0, 1, 2, 3)]
    processor = TeacherProcessor(FAMILIES["qwen3_vl"].processor)
    for workers in (0, 1):
        loader = StepLoader(
            corpus, processor, batch_size=3, max_length=200, shuffle=False, workers=workers
        )
        steps = list(loader.steps(0, 3))
        assert not any(step.bad for step in steps)
        assert [len(step.micro_batches[0].inputs["image_grid_thw"]) for step in steps] == [1, 1, 2]
    before = fingerprint(corpus)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 3)
    assert fingerprint(open_corpus(tmp_path)) != before


def write_table(file: Path, columns: dict[str, Any]) -> Path:
    """A Parquet or Arrow file of these arrays, or pairs of values and a type's name."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(
        {k: arrow.array(v[0], v[1]) if isinstance(v, tuple) else v for k, v in columns.items()}
    )
    if file.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, file)
    else:
        with arrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    return file


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_values_that_python_does_not_hold(name: str, tmp_path: Path) -> None:
    """They are bad rows in a column of the sample, and are not read in another."""
    arrow = pytest.importorskip("pyarrow")
    damaged = [arrow.py_buffer(bytes(4) + b"\2\0\0\0\3\0\0\0"), arrow.py_buffer(b"\xff\xfea")]
    text = arrow.Array.from_buffers(arrow.string(), 2, [None, *damaged])
    corpus = open_corpus(write_table(tmp_path / name, {"text": text}))
    message = refused(lambda: corpus[0]).message
    assert message.startswith(f"{name}:1: cannot be read: 'utf-8' codec")
    assert corpus[1].text == "a"
    # Nanoseconds, days beyond the year 9999.
    others = {"text": ["a"], "when": ([3], "timestamp[ns]"), "day": ([2**30], "date32")}
    assert open_corpus(write_table(tmp_path / name, others))[0].text == "a"
    others = {"text": ([3], "timestamp[ns]")}
    corpus = open_corpus(write_table(tmp_path / name, others))
    assert refused(lambda: corpus[0]).message.startswith(f"{name}:1: cannot be read: ")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_are_missing_or_there_twice(name: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    file = write_table(tmp_path / name, {"question": ["a"], "image": ["b"]})
    error = refused(lambda: open_corpus(file))
    assert error.message.endswith(
        "has the columns question, image, expected one of conversations, messages, texts, text"
    )
    twice = arrow.table([["a"], ["b"]], names=["text", "text"])
    if file.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(twice, file)
    else:
        with arrow.ipc.new_stream(str(file), twice.schema) as writer:
            writer.write_table(twice)
    assert "has two columns called text" in refused(lambda: open_corpus(file)).message


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", 2)
    file.write_bytes(file.read_bytes()[:-20])
    assert "cannot be read" in refused(lambda: open_corpus(file)).message
    assert "does not exist" in refused(lambda: open_corpus(tmp_path / "b.parquet")).message


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(rows(3))
    with arrow.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    corpus = open_corpus(tmp_path)
    assert [corpus[index].name for index in range(3)] == [f"data.arrow:{n}" for n in (1, 2, 3)]
    assert read_image(corpus[1].images[0]) == png(1)  # type: ignore[arg-type]
