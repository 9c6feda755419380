"""Reading of samples from JSON lines, lists, meta files and shards, and their errors."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmmamba_cli.data import Sample, SampleEncoder, check_data, open_corpus
from mmmamba_cli.data.jsonl import JsonLines
from mmmamba_cli.data.loader import SampleOrder
from mmmamba_cli.data.sample import parse_sample
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import HolisticVLMProcessor

GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


def lines(file: Path, *records: Any) -> Path:
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return file


def refused(action: Any) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


def test_offsets_of_lines(tmp_path: Path) -> None:
    """Blank lines, CRLF, no final newline, non-ASCII text."""
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"a": 1}\n\n \r\n{"ä": "→"}\r\n   \n{"b": 2}'.encode())
    found = JsonLines(file)
    assert [found[i] for i in range(len(found))] == [{"a": 1}, {"ä": "→"}, {"b": 2}]
    assert [found.name(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:6"]


def test_lines_may_span_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "a.jsonl", *({"n": n, "x": "y" * (n % 7)} for n in range(50)))
    monkeypatch.setattr("mmmamba_cli.data.jsonl.LINE_BLOCK_BYTES", 5)
    found = JsonLines(file)
    assert [found[i]["n"] for i in range(len(found))] == list(range(50))


def test_three_formats_of_a_sample() -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    expected = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
    for record in (GOOD, chat):
        assert parse_sample(record, "x", Path).messages == expected
    assert parse_sample({"text": "plain"}, "x", Path) == Sample("x", text="plain")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "is a list, expected a JSON object"),
        ({}, "has no turns"),
        ({"conversations": []}, "has no turns"),
        ({"text": 5}, "text is 5"),
        ({"conversations": ["Hi"]}, "turn 1 is a str"),
        ({"conversations": [{"from": "dog", "value": "Hi"}]}, "turn 1 is from 'dog'"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1 says None"),
        ({"conversations": GOOD["conversations"][:1]}, "ends without an answer"),
        ({"conversations": GOOD["conversations"][::-1]}, "turn 1 is the assistant's, expected"),
        ({"conversations": [{"from": "system", "value": "Be nice"}]}, "ends without an answer"),
        ({**GOOD, "image": 5}, "image is 5"),
        ({**GOOD, "image": ["a.png", ""]}, "image is ''"),
    ],
)
def test_malformed_samples(record: Any, message: str) -> None:
    text = refused(lambda: parse_sample(record, "set.jsonl:3", Path))
    assert text.startswith("set.jsonl:3")
    assert message in text


def test_files_that_are_not_datasets(tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: open_corpus(tmp_path / "gone.jsonl"))
    assert "does not exist" in refused(lambda: open_corpus(tmp_path / "gone.json"))
    assert "does not exist" in refused(lambda: open_corpus(tmp_path / "gone.tar"))
    assert "of no kind we read" in refused(lambda: open_corpus(tmp_path / "a.csv"))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    assert "is a folder" in refused(lambda: open_corpus(folder))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    assert "has no samples" in refused(lambda: open_corpus(empty))
    text = tmp_path / "text.tar"
    text.write_text("no tar")
    assert "is not a tar file" in refused(lambda: open_corpus(text))


def test_images_may_not_leave_their_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.png"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(outside)
    (root / "link.png").symlink_to(outside)
    (root / "disk2").symlink_to(tmp_path)
    outer = ["../secret.png", str(outside), "disk2/../../secret.png", "x/../../secret.png"]
    file = lines(tmp_path / "a.jsonl", *({**GOOD, "image": name} for name in [*outer, "gone.png"]))
    corpus = open_corpus(file, root)
    for index in range(len(outer)):
        assert "outside the image root" in refused(lambda i=index: corpus[i])
    assert refused(lambda: corpus[len(outer)]).startswith("a.jsonl:5: image")


def test_links_in_the_root_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: HolisticVLMProcessor
) -> None:
    """Links to a picture, to a folder on another disk, and as the root itself."""
    store, root = tmp_path / "disk2", tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    store.mkdir()
    Image.new("RGB", (8, 8)).save(store / "x.png")
    Image.new("RGB", (9, 9)).save(root / "y.png")
    (root / "one.png").symlink_to(store / "x.png")
    (root / "coco").symlink_to(store)
    (root / "deep" / "up").symlink_to(store)
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    # `deep/up/..` is `deep` by name, but the target of the link has another parent.
    names = ["one.png", "coco/x.png", "deep/up/x.png", "deep/up/../../y.png", str(root / "y.png")]
    file = lines(tmp_path / "a.jsonl", *({**GOOD, "image": name} for name in names))
    monkeypatch.chdir(tmp_path)
    for base in (root, linked, Path("linked")):
        report = check_data(open_corpus(file, base), processor, 400)
        assert (report.bad, report.images) == ([], len(names))


@pytest.mark.filterwarnings("ignore::mmmamba_cli.processing.images.ImageNote")
def test_encoding_errors(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    Image.new("RGB", (90, 45)).save(tmp_path / "wide.png")
    data = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "short.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(
        tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    two = [{"from": "human", "value": "<image> and <image>"}, {"from": "gpt", "value": "Ho"}]
    file = lines(
        tmp_path / "a.jsonl",
        {**GOOD, "image": "text.png"},
        {"conversations": two, "image": "wide.png"},
        {**GOOD, "image": "wide.png"},
        {**GOOD, "image": "short.png"},
        {**GOOD, "image": "film.gif"},
        "{broken",
        GOOD,
    )
    report = check_data(open_corpus(file, tmp_path), processor, 400)
    names = [sample.name for sample in report.bad]
    assert names == [f"a.jsonl:{n}" for n in (1, 2, 4, 6)]
    reasons = {sample.name: sample.reason for sample in report.bad}
    assert "not in an image format" in reasons["a.jsonl:1"]
    assert "2 <image> but 1 images" in reasons["a.jsonl:2"]
    assert "is not JSON" in reasons["a.jsonl:6"]
    assert (report.samples, len(report.bad), report.with_images) == (7, 4, 2)
    assert report.images == 2
    assert report.tiles == 4
    short = SampleEncoder(processor, 20, None)
    assert "lose part of an image" in refused(lambda: short(open_corpus(file, tmp_path)[2]))
    assert len(short(open_corpus(file, tmp_path)[6])) == 20


def test_meta_files(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 10)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
        lines(tmp_path / f"{name}.jsonl", *({**GOOD, "image": "x.png"} for _ in range(count)))
    meta = tmp_path / "meta.json"
    entries = {
        "one": {"annotation": "a.jsonl", "root": "a", "repeat_time": 2, "length": 99},
        "two": {"annotation": "b.jsonl", "root": "b", "repeat_time": 0.5, "weight": 0.6},
    }
    meta.write_text(json.dumps(entries))
    corpus = open_corpus(meta)
    assert [(p.samples, p.repeats) for p in corpus.parts] == [(4, 2.0), (10, 0.3)]
    assert [Path(str(corpus[i].images[0])).parent.name for i in (0, 3, 4, 13)] == list("aabb")
    order = SampleOrder(corpus.parts, seed=0, shuffle=True)
    assert order.length == 11
    for number in range(3):
        stream = [order[i] for i in range(11 * number, 11 * number + 11)]
        assert sorted(i for i in stream if i < 4) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len({i for i in stream if i >= 4}) == 3
    for wrong, message in (
        ({"one": {"root": "a"}}, "has no annotation"),
        ({"one": {"annotation": "gone.jsonl"}}, "does not exist"),
        ({"one": {"annotation": "a.jsonl", "repeat_time": 0}}, "repeat_time: is 0"),
        ({}, "names no sets"),
        ([], "has no samples"),
        (3, "is a int, expected a list of conversations or a meta file"),
    ):
        meta.write_text(json.dumps(wrong))
        assert message in refused(lambda: open_corpus(meta))


def test_shards(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (90, 45)).save(picture, "PNG")
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard:02}.tar", "w") as tar:
            for n in range(3):
                members = {f"d/{n}.json": json.dumps(GOOD).encode()}
                if n == 1:
                    members[f"d/{n}.png"] = picture.getvalue()
                if n == 2:
                    named = json.dumps({**GOOD, "image": "gone.png"})
                    members[f"d/{n}.json"] = named.encode()
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    corpus = open_corpus(str(tmp_path / "part-{00..01}.tar"))
    assert len(corpus) == 6
    encoder = SampleEncoder(processor, 400, None)
    assert encoder(corpus[4]).num_tiles == (3,)
    assert encoder(corpus[3]).num_tiles == ()
    assert "part-01.tar/d/2.json: image gone.png is not in the shard" in refused(lambda: corpus[5])


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["conversations", "messages", "image", "text", "from", "value", "role"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(anything)
def test_any_record_is_a_sample_or_a_clean_error(record: Any) -> None:
    try:
        sample = parse_sample(record, "a.jsonl:1", Path)
    except DataError as error:
        assert str(error).startswith("a.jsonl:1")
    else:
        assert sample.text or sample.messages


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_a_clean_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.jsonl"
        file.write_bytes(data)
        found = JsonLines(file)
        for index in range(len(found)):
            try:
                found[index]
            except DataError as error:
                assert str(error).startswith("a.jsonl:")


def test_image_paths_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for picture in (folder / "a.png", tmp_path / "b.png"):
        Image.new("RGB", (8, 8)).save(picture)
    file = lines(folder / "a.jsonl", {**GOOD, "image": "a.png"}, {**GOOD, "image": "../b.png"})
    monkeypatch.chdir(tmp_path)
    for source in (file, Path("data/a.jsonl")):
        corpus = open_corpus(source)
        (picture,) = corpus[0].images
        assert picture == folder / "a.png"
        assert "outside the image root" in refused(lambda found=corpus: found[1])


def test_a_byte_order_mark_before_the_first_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + json.dumps(GOOD) + "\n" + json.dumps(GOOD), encoding="utf-8")
    corpus = open_corpus(file)
    assert corpus[0].messages == corpus[1].messages
