"""Bad samples and datasets are reported by name and never end a run with a traceback."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmmamba_cli.data import Sample, SampleEncoder, StepLoader, check_data, open_corpus
from mmmamba_cli.data.dataset import CorpusPart
from mmmamba_cli.data.loader import SampleOrder
from mmmamba_cli.data.sample import parse_sample
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import HolisticVLMProcessor

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
GOOD = {"conversations": TURNS}


def write(file: Path, *records: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return file


def bad_of(
    source: Path | str, root: Path | None, processor: HolisticVLMProcessor, count: int
) -> dict[str, str]:
    """Names and reasons of the bad samples, which a loader and `check_data` report alike."""
    corpus = open_corpus(source, root)
    loader = StepLoader(corpus, processor, batch_size=count, max_length=300, shuffle=False)
    (step,) = loader.steps(0, 1)
    found = {sample.name: sample.reason for sample in step.bad}
    checked = check_data(corpus, processor, 300, limit=count).bad
    assert {sample.name: sample.reason for sample in checked} == found
    assert step.micro_batches[0].num_samples == count - len(found)
    return found


def test_names_are_separated_from_reasons(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    """Also for a file name with a space, and for an error of the processor."""
    surrogate = '{"text": "a\\ud800"}'
    talk = (
        '{"conversations": [{"from": "human", "value": "\\udc00"}, {"from": "gpt", "value": ""}]}'
    )
    file = write(tmp_path / "my set: one.jsonl", GOOD, "{broken", surrogate, talk, {**GOOD, "x": 1})
    found = bad_of(file, None, processor, 5)
    assert list(found) == [f"my set: one.jsonl:{line}" for line in (2, 3, 4)]
    assert all(reason.startswith(("is not JSON", "the text has")) for reason in found.values())


def test_files_with_equal_names_in_a_meta_file(
    tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "train.jsonl", GOOD, "{broken")
    entries = {n: {"annotation": f"{n}/train.jsonl", "root": n} for n in ("one", "two")}
    meta = write(tmp_path / "meta.json", entries)
    assert list(bad_of(meta, None, processor, 4)) == ["one/train.jsonl:2", "two/train.jsonl:2"]


@pytest.mark.parametrize("speaker", [[], {}, ["human"], 3, None])
def test_roles_that_are_not_strings(speaker: Any) -> None:
    record = {"conversations": [{"from": speaker, "value": "Hi"}]}
    with pytest.raises(DataError, match=r"^set:1: turn 1 is from"):
        parse_sample(record, "set:1", Path)


def test_keys_that_are_null_or_empty() -> None:
    """Datasets exported from tables have such keys."""
    plain = parse_sample(GOOD, "x", Path)
    nulls = {"text": None, "image": None, "messages": None, "video": None}
    assert parse_sample({**nulls, **GOOD}, "x", Path) == plain
    assert parse_sample({**GOOD, "image": ""}, "x", Path) == plain
    assert parse_sample({**GOOD, "text": "a remark"}, "x", Path) == plain
    assert parse_sample({"conversations": None, "text": "a"}, "x", Path) == Sample("x", text="a")
    chat = [{"from": None, "role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert parse_sample({"conversations": None, "messages": chat}, "x", Path) == plain
    both = {**GOOD, "image": None, "images": ["a.png"]}
    assert parse_sample(both, "x", Path).images == (Path("a.png"),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "image": "a.png"}, "has an image or a video and no turns"),
        ({**GOOD, "video": 3}, "a video is 3"),
        ({**GOOD, "video": "a.mp4", "fps": 0}, "fps is 0"),
        ({**GOOD, "video": "a.mp4", "fps": 10**400}, "fps is 1000"),
        ({"text": ""}, "text is ''"),
    ],
)
def test_content_that_would_be_ignored_silently(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^x: {message}"):
        parse_sample(record, "x", Path)


def test_circular_links(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    file = write(tmp_path / "set.jsonl", {**GOOD, "image": "a.png"}, GOOD)
    assert "does not exist" in bad_of(file, tmp_path, processor, 2)["set.jsonl:1"]


def test_damaged_images_with_other_pil_errors(
    tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    """A TIFF with a text as the offset of its pixels opens, and raises a TypeError on decoding."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "TIFF")
    number, text = (struct.pack("<HH", 273, kind) for kind in (4, 2))
    data = picture.getvalue()
    assert data.count(number) == 1
    (tmp_path / "a.tif").write_bytes(data.replace(number, text))
    file = write(tmp_path / "set.jsonl", {**GOOD, "image": "a.tif"}, GOOD)
    assert "a.tif is damaged" in bad_of(file, tmp_path, processor, 2)["set.jsonl:1"]


def test_a_file_that_is_removed(tmp_path: Path) -> None:
    file = write(tmp_path / "set.jsonl", GOOD)
    corpus = open_corpus(file)
    file.unlink()
    with pytest.raises(DataError, match=r"^set\.jsonl:1: cannot be read"):
        corpus[0]
    shard = write_shard(tmp_path / "a.tar", {"0.json": json.dumps(GOOD).encode()})
    corpus = open_corpus(shard)
    shard.unlink()
    with pytest.raises(DataError, match=r"^a\.tar/0\.json: .*a\.tar cannot be read"):
        corpus[0]


def test_datasets_that_fail_to_open(tmp_path: Path) -> None:
    file = write(tmp_path / "set.jsonl", GOOD)
    empty = write(tmp_path / "empty.jsonl", "")

    def refused(source: Path, root: Path | None = None) -> str:
        with pytest.raises(DataError) as caught:
            open_corpus(source, root)
        return str(caught.value)

    def meta(**entry: Any) -> str:
        return refused(write(tmp_path / "meta.json", {"one": {"annotation": str(file), **entry}}))

    assert "nowhere is not a folder" in refused(file, tmp_path / "nowhere")
    assert "set.jsonl is not a folder" in refused(file, file)
    assert "meta.json: one: the image root" in meta(root="nowhere")
    assert "meta.json: one: " in meta(annotation="gone.jsonl")
    assert f"one: {empty} has no samples" in meta(annotation=str(empty), repeat_time=0.5)
    assert "expected a list of conversations" in refused(write(tmp_path / "list.json", 3))
    assert "put it in [ ]" in refused(write(tmp_path / "one.json", GOOD))
    assert "is called .jsonl" in refused(write(tmp_path / "lines.json", GOOD, GOOD))
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert "folder.json cannot be read" in refused(folder)
    no_json = write_shard(tmp_path / "a.tar", {"0.png": b"x"})
    assert "a .json member" in refused(no_json)


@pytest.mark.parametrize("repeats", [0.5, 1.0, 2.5])
def test_a_part_without_samples_adds_nothing(repeats: float) -> None:
    order = SampleOrder([CorpusPart("a", 4), CorpusPart("b", 0, repeats)], seed=0, shuffle=True)
    assert sorted(order[i] for i in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]


def write_shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:2048] + b"\xa5" * 512 + data[2560:],
        lambda data: data[: 2048 + 100],
        lambda data: data[: 1536 + 3],
    ],
    ids=["header", "cut in a header", "cut in a member"],
)
def test_shards_that_would_lose_samples(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """tarfile stops at an unreadable header; members have 512 + 512 bytes here."""
    sample = json.dumps(GOOD).encode()
    file = write_shard(tmp_path / "a.tar", {f"{n}.json": sample for n in range(4)})
    assert len(open_corpus(file)) == 4
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"a\.tar is not a tar file that can be read"):
        open_corpus(file)


def test_a_shard_without_an_end_mark_is_complete(tmp_path: Path) -> None:
    file = write_shard(tmp_path / "a.tar", {"0.json": json.dumps(GOOD).encode()})
    file.write_bytes(file.read_bytes()[:1024])
    assert len(open_corpus(file)) == 1


def test_pictures_of_a_shard(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    """Found by key if `image` is null; damaged ones are reported by sample."""
    picture = io.BytesIO()
    Image.new("RGB", (90, 45), "red").save(picture, "PNG")
    good, cut = picture.getvalue(), picture.getvalue()[:60]
    null, named = ({**GOOD, "image": name} for name in (None, "1.PNG"))
    members = {"0.json": null, "0.png": good, "1.json": named, "1.PNG": cut, "2.json": GOOD}
    data = {n: v if isinstance(v, bytes) else json.dumps(v).encode() for n, v in members.items()}
    file = write_shard(tmp_path / "a.tar", data)
    assert list(bad_of(file, None, processor, 3)) == ["a.tar/1.json"]
    encoded = SampleEncoder(processor, 300, None)(open_corpus(file)[0])
    assert encoded.num_tiles == (3,)


def test_pax_names_in_a_shard(tmp_path: Path) -> None:
    long = f"{'ö' * 200}/0.json"
    file = write_shard(tmp_path / "a.tar", {long: json.dumps(GOOD).encode()})
    assert b" path=" in file.read_bytes()
    assert open_corpus(file).name(0) == f"a.tar/{long}"


def test_unreadable_datasets(tmp_path: Path, processor: HolisticVLMProcessor) -> None:
    """Pictures are decoded too; the first readable sample ends the search."""
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")

    def unreadable(*records: Any) -> list[str] | None:
        corpus = open_corpus(write(tmp_path / "set.jsonl", *records), tmp_path)
        found = StepLoader(corpus, processor, batch_size=2, max_length=300).unreadable()
        return None if found is None else sorted(sample.name for sample in found)

    lost = [{**GOOD, "image": "gone.png"}, "{broken", {**GOOD, "image": "cut.png"}]
    assert unreadable(*lost) == ["set.jsonl:1", "set.jsonl:2", "set.jsonl:3"]
    assert unreadable(*lost, GOOD) is None
