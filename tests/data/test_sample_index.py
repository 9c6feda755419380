"""A data index changes what a process prepares, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import write_conversations
from families import FAMILIES
from PIL import Image

from mmmamba_cli.data import (
    BadSample,
    Batch,
    ColumnLimit,
    ModelBatch,
    SampleIndex,
    SampleSize,
    StepBatches,
    StepLoader,
    build_index,
    check_data,
    index_key,
    open_corpus,
    read_index,
)
from mmmamba_cli.data.collator import make_collator
from mmmamba_cli.data.dataset import ConversationFile
from mmmamba_cli.data.fingerprint import content_digest
from mmmamba_cli.data.holistic_collator import HolisticCollator
from mmmamba_cli.data.teacher_collator import TeacherCollator
from mmmamba_cli.errors import DataError
from mmmamba_cli.ops.attention import VarlenMetadata
from mmmamba_cli.processing import HolisticVLMProcessor, TeacherProcessor

MAX_LENGTH = 260
BATCHINGS = ("padded", "bucketed", "packed")


def turns(question: str, *answers: str) -> list[dict[str, str]]:
    said = [{"from": "human", "value": question}]
    for answer in answers:
        said += [{"from": "gpt", "value": answer}, {"from": "human", "value": "So?"}]
    return said[:-1]


# What a corpus may have besides good samples; pictures of 24 and 90 pixels are there.
UNUSUAL: tuple[Any, ...] = (
    "{broken",
    {"image": "missing.png", "conversations": turns("<image>\nWhat?", "It.")},
    {"text": "the cat sits on the table " * 30},
    {"text": "<|im_end|> and <IMG_CONTEXT> are words"},
    {"conversations": turns("Long?", "very long indeed " * 40)},
    {"conversations": turns("Ends with a question?")},
    {"image": "b.png", "conversations": turns("long " * 200 + "<image>", "Cut.")},
    {"image": ["a.png", "b.png"], "conversations": turns("Compare.", "<ref>a</ref>", "Yes.")},
    {"image": "a.png", "conversations": turns("<image> <image>", "One is missing.")},
    {"video": ["a.png", "a.png"], "conversations": turns("<video>", "No.")},
    {"conversations": turns("a\ud800", "b")},
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl` of good and bad samples with pictures beside it."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = write_conversations(folder, 21).read_text().splitlines()
    for name, size in (("a.png", (24, 24)), ("b.png", (90, 30))):
        Image.new("RGB", size, (3, 4, 5)).save(folder / name)
    unusual = [each if isinstance(each, str) else json.dumps(each) for each in UNUSUAL]
    for number, line in enumerate(unusual):
        lines.insert(2 * number, line)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def index_of(source: Path | str, root: Path, processor: Any, workers: int = 0) -> SampleIndex:
    corpus = open_corpus(source, root)
    return build_index(corpus, processor, index_key(corpus, processor), workers=workers)


def alike(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, VarlenMetadata):
        return all(map(alike, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[name], two[name]) for name in one)
    if isinstance(one, Batch | ModelBatch):
        return type(one) is type(two) and all(
            alike(getattr(one, field.name), getattr(two, field.name)) for field in fields(one)
        )
    return bool(one == two)


def same(one: StepBatches, two: StepBatches) -> bool:
    return (
        (one.step, one.bad, one.num_planned) == (two.step, two.bad, two.num_planned)
        and len(one.micro_batches) == len(two.micro_batches)
        and all(map(alike, one.micro_batches, two.micro_batches))
    )


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the samples that collators encode."""
    encoded: list[str] = []
    for collator in (HolisticCollator, TeacherCollator):
        encode = collator.encode

        def counted(self: Any, sample: Any, encode: Any = encode) -> Any:
            encoded.append(sample.name)
            return encode(self, sample)

        monkeypatch.setattr(collator, "encode", counted)
    return encoded


@pytest.mark.parametrize("batching", BATCHINGS)
def test_each_process_prepares_its_share_of_the_same_batches(
    batching: str, mixed: Path, processor: HolisticVLMProcessor, encodings: list[str]
) -> None:
    """Bits, order and bad samples for 1, 2 and 8 processes; samples encoded by each of them."""
    corpus = open_corpus(mixed / "train.jsonl", mixed)
    index = index_of(mixed / "train.jsonl", mixed, processor)
    numbers = set()
    for world in (1, 2, 8):
        for step in range(3):
            prepared = {"plain": 0, "indexed": 0}
            shares = []
            for rank in range(world):
                options: dict[str, Any] = {"batching": batching, "rank": rank}
                options |= {"batch_size": 16, "max_length": MAX_LENGTH, "world_size": world}
                options["accumulation"] = ColumnLimit(2 * MAX_LENGTH) if step else 2
                encodings.clear()
                expected = StepLoader(corpus, processor, **options).step(step)
                prepared["plain"] += len(encodings)
                encodings.clear()
                found = StepLoader(corpus, processor, **options, index=index).step(step)
                prepared["indexed"] += len(encodings)
                assert same(found, expected)
                numbers.add(len(found.micro_batches))
                names = [name for micro in found.micro_batches for name in micro.names]
                assert sorted(encodings) == sorted(names)
                shares += names
            usable = 16 - len(expected.bad)
            assert len(shares) == prepared["indexed"] == usable >= 8
            # A sample that is no JSON is not encoded.
            assert world * usable <= prepared["plain"] <= world * 16
    assert len(numbers) > 2


def test_an_index_holds_for_every_maximum_length(
    mixed: Path, processor: HolisticVLMProcessor
) -> None:
    corpus = open_corpus(mixed / "train.jsonl", mixed)
    index = index_of(mixed / "train.jsonl", mixed, processor)
    for max_length in (40, 150, MAX_LENGTH, 4096):
        report = check_data(corpus, processor, max_length, decode=False)
        reasons = {}
        for sample in range(len(corpus)):
            try:
                assert index.length(sample, max_length) > 0
            except DataError as error:
                reasons[corpus.name(sample)] = error.message
        assert reasons == {bad.name: bad.reason for bad in report.bad}
        totals = index.summary(max_length)
        assert totals.longest == max(index.summary(4096).longest, *report.lengths)
        found = (totals.samples, totals.images, totals.tiles, totals.tokens, totals.cut, totals.bad)
        expected = (report.samples, report.images, report.tiles, report.tokens, report.cut)
        assert found == (*expected, len(report.bad))
    assert index.reason(0).startswith("is not JSON") and index.reason(1) is None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "qwen3"])
def test_samples_of_a_teacher_s_processor(name: str, mixed: Path, encodings: list[str]) -> None:
    processor = TeacherProcessor(FAMILIES[name].processor)
    corpus = open_corpus(mixed / "train.jsonl", mixed)
    index = index_of(mixed / "train.jsonl", mixed, processor)
    collator = make_collator(corpus, processor, 1 << 40)
    for sample in range(len(corpus)):
        try:
            encoded = collator.encode(corpus[sample])
        except DataError as error:
            assert f"{corpus.name(sample)}: {index.reason(sample)}" == error.message
        else:
            size = index.size(sample)
            assert (size.tokens, size.images) == (len(encoded), len(encoded.images))
    for rank in range(2):
        options: dict[str, Any] = {"batch_size": 8, "max_length": 90, "world_size": 2}
        plain = StepLoader(corpus, processor, **options, rank=rank)
        indexed = StepLoader(corpus, processor, **options, rank=rank, index=index)
        encodings.clear()
        found = indexed.step(1)
        assert len(encodings) == sum(micro.num_samples for micro in found.micro_batches) <= 5
        assert same(found, plain.step(1))


def test_workers_measure_the_same(
    mixed: Path, processor: HolisticVLMProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmmamba_cli.data.index_builder.CHUNK_SAMPLES", 5)
    alone = index_of(mixed / "train.jsonl", mixed, processor)
    shared = index_of(mixed / "train.jsonl", mixed, processor, workers=2)
    assert shared.to_bytes() == alone.to_bytes()


def test_the_file_is_read_as_it_was_written(
    tmp_path: Path, mixed: Path, processor: HolisticVLMProcessor
) -> None:
    index = index_of(mixed / "train.jsonl", mixed, processor)
    file = tmp_path / "a.index"
    file.write_bytes(index.to_bytes())
    again = read_index(file)
    assert again.key == index.key and again.to_bytes() == index.to_bytes()
    assert isinstance(again._tensors["tokens"], np.memmap)
    for content in (file.read_bytes()[:-1], b"", b"\xff" * 64, b"\x02" + bytes(7) + b"{}"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="is not a complete data index"):
            read_index(file)
    later = SampleIndex(replace(index.key, format=99), index._tensors)
    file.write_bytes(later.to_bytes())
    with pytest.raises(DataError, match="format 99"):
        read_index(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_index(tmp_path / "none.index")


def test_positions_are_those_of_the_records(
    mixed: Path, tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    """Of JSON lines with blank ones between them, and of a list; other corpora have none."""
    good = [
        line for line in (mixed / "train.jsonl").read_text().splitlines() if "broken" not in line
    ]
    for name, text in (
        ("lines.jsonl", "\ufeff\n\n" + "\n  \n".join(good)),
        ("list.json", " [" + " ,\n".join(good) + "]\n"),
    ):
        source = tmp_path / name
        source.write_text(text)
        corpus = open_corpus(source, mixed)
        index = index_of(source, mixed, processor)
        again = open_corpus(source, mixed, index=index)
        assert isinstance(corpus, ConversationFile) and isinstance(again, ConversationFile)
        assert again.records.positions is index.positions
        assert len(again) == len(corpus) == len(good)
        for i in range(len(good)):
            assert again.records[i] == corpus.records[i] == json.loads(good[i])
            assert again.name(i) == corpus.name(i)
    meta = tmp_path / "sets.json"
    meta.write_text(json.dumps({"a": {"annotation": "lines.jsonl", "root": str(mixed)}}))
    assert index_of(meta, mixed, processor).positions is None


def test_an_index_without_bad_samples(folder: Path, processor: HolisticVLMProcessor) -> None:
    index = index_of(folder / "train.jsonl", folder, processor)
    assert index.summary(4096).bad == 0
    assert [index.reason(sample) for sample in range(23)] == [None] * 23


def write_set(folder: Path) -> tuple[Path, Path]:
    file = write_conversations(folder, 6)
    return file, folder / "images" / "train-1.png"


@pytest.mark.parametrize("name", ["hovle", "qwen3_vl"])
def test_a_picture_that_has_changed_is_a_bad_sample_of_one_process(
    name: str, tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    """A picture of another size, whose row would not be as long as planned, and a damaged one."""
    source, picture = write_set(tmp_path)
    own = processor if name == "hovle" else TeacherProcessor(FAMILIES[name].processor, True)
    index = index_of(source, tmp_path, own)
    options: dict[str, Any] = {"batch_size": 6, "max_length": 400, "world_size": 6}
    options["batching"] = "packed"
    changes: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: Image.new("RGB", (300, 50)).save(picture), "in the data index: its pictures"),
        (lambda: picture.write_bytes(b"no picture"), "is not in an image format"),
    )
    for change, reason in changes:
        change()
        corpus = open_corpus(source, tmp_path)
        steps = [
            StepLoader(corpus, own, **options, rank=rank, index=index).step(0) for rank in range(6)
        ]
        bad: list[BadSample] = [one for step in steps for one in step.bad]
        assert [(one.name, one.seen_by_all) for one in bad] == [("train.jsonl:2", False)]
        assert reason in bad[0].reason
        assert sum(micro.num_samples for step in steps for micro in step.micro_batches) == 5


def test_data_that_change_while_they_are_indexed(
    tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    source, picture = write_set(tmp_path)
    for file, message in ((picture, "changed while the index was"), (source, "changed after it")):
        corpus = open_corpus(source, tmp_path)

        def grow(_: int, file: Path = file) -> None:
            with file.open("a") as handle:
                handle.write('{"text": "one more"}\n')

        with pytest.raises(DataError, match=message):
            build_index(corpus, processor, index_key(corpus, processor), advance=grow)


def test_repeats_of_a_mixture_are_not_part_of_its_content(tmp_path: Path) -> None:
    file, _ = write_set(tmp_path)
    digests = []
    for times in (1, 2.5):
        meta = tmp_path / f"sets-{times}.json"
        entry = {"annotation": file.name, "root": ".", "repeat_time": times}
        meta.write_text(json.dumps({"a": entry}))
        digests.append(content_digest(open_corpus(meta, tmp_path)))
    assert digests[0] == digests[1]
    assert content_digest(open_corpus(file, tmp_path)) == digests[0]


def test_conversations_are_counted_as_they_are_encoded(processor: HolisticVLMProcessor) -> None:
    """`conversation_length` against the ids, with images in several turns and grounding tokens."""
    talks: list[tuple[list[dict[str, Any]], list[int]]] = [
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}], []),
        (
            [
                {"role": "system", "content": "Be <ref>kind</ref>."},
                {"role": "user", "content": "<image> and <image>?"},
                {"role": "assistant", "content": "<box>[1, 2]</box> <|im_end|> 猫"},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "No."},
            ],
            [3, 1, 7],
        ),
    ]
    for messages, num_tiles in talks:
        ids, _ = processor.conversation_ids(messages, num_tiles)
        last = max((i for i, x in enumerate(ids) if x == processor.image_token_id), default=-1)
        assert processor.conversation_length(messages, num_tiles) == (len(ids), last + 1)
    with pytest.raises(DataError, match="2 <image> but 1 images"):
        processor.conversation_length([{"role": "user", "content": "<image><image>"}], [1])


def test_truncation() -> None:
    size = SampleSize(tokens=10, required=4, images=1)
    assert [size.truncated(limit) for limit in (4, 9, 10, 11)] == [4, 9, 10, 10]
    with pytest.raises(DataError, match="it would lose part of an image"):
        size.truncated(3)
    with pytest.raises(DataError, match="a video"):
        SampleSize(tokens=10, required=4).truncated(3)
