"""Malformed samples are named and counted alike by `data check`, the index and the loaders."""

from __future__ import annotations

import json
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_checkpoint import write_hovle

from mmmamba_cli.data import StepLoader, build_index, check_data, index_key, open_corpus, read_index
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor, processor_from_folder

EXAMPLES = 40
MAX_LENGTH = 700
# Phrases of Python's own messages, which are not for users.
PYTHON = re.compile(r"Traceback|object has no attribute|not subscriptable|NoneType|object at 0x")
PICTURES = (
    "good.png",
    "one.png",
    "cmyk.jpg",
    "grey16.png",
    "moving.gif",
    "wide.png",
    "cut.jpg",
    "empty.png",
    "folder.png",
    "no-pixels.png",
    "huge.png",
    "missing.png",
    "",
    "a\0b",
    "\ud800.png",
    "\u202egnp.a",
    "x" * 300,
    "../good.png",
    "/etc/passwd",
    "https://example.org/a.png",
    "data:image/png;base64,AA",
)
TEXTS = (
    "hello",
    "",
    " ",
    "\0",
    "\ud800",
    "\u202eabc\u202c",
    "\u2028",
    "\ufeff",
    "<image>",
    "<image>\n<image>",
    "<video>",
    "<IMG_CONTEXT>",
    "<|im_end|>",
    "<|vision_start|>",
    "long " * 200,
)


def png(width: int, height: int) -> bytes:
    """A PNG whose header has this size, and whose pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_pictures(folder: Path) -> None:
    Image.new("RGB", (40, 30)).save(folder / "good.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("CMYK", (20, 20)).save(folder / "cmyk.jpg")
    Image.new("I;16", (20, 20)).save(folder / "grey16.png")
    frames = [Image.new("P", (20, 20), n) for n in range(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (900, 1)).save(folder / "wide.png")
    whole = BytesIO()
    Image.effect_noise((90, 90), 50).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:900])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    (folder / "no-pixels.png").write_bytes(png(0, 0))
    (folder / "huge.png").write_bytes(png(60_000, 60_000))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


JUNK = st.sampled_from(
    [None, True, 0, -1, 1.5, float("nan"), 10**30, "x", [], {}, [None], {"a": 1}, nested(200)]
)
PICTURE = st.sampled_from(PICTURES)
TEXT = st.sampled_from(TEXTS)
PART = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT),
    st.builds(lambda image: {"type": "image", "image": image}, st.one_of(PICTURE, JUNK)),
    st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, PICTURE),
    st.builds(lambda video: {"type": "video", "video": video}, st.one_of(PICTURE, JUNK)),
    st.sampled_from([{"type": "image"}, {"type": "text"}, {"type": ["image"]}]),
    JUNK,
)
CONTENT = st.one_of(TEXT, TEXT, st.lists(PART, max_size=3), JUNK)


@st.composite
def turns(draw: st.DrawFn) -> list[Any]:
    """Mostly questions and answers in turns, of either set of keys."""
    keys, roles = draw(
        st.sampled_from(
            [
                (("from", "value"), ("human", "gpt")),
                (("role", "content"), ("user", "assistant")),
            ]
        )
    )
    said: list[Any] = [
        {keys[0]: roles[number % 2], keys[1]: draw(CONTENT)}
        for number in range(draw(st.sampled_from((2, 2, 2, 4, 0, 1, 3))))
    ]
    for _ in range(draw(st.sampled_from((0, 0, 0, 1)))):
        said.insert(draw(st.integers(0, len(said))), draw(JUNK))
    return said


@st.composite
def records(draw: st.DrawFn) -> Any:
    key = draw(st.sampled_from(("conversations", "messages", "texts", "text")))
    pair = {"user": draw(TEXT), "assistant": draw(TEXT)}
    value = {"text": draw(TEXT), "texts": [pair, draw(JUNK)]}.get(key)
    record: dict[str, Any] = {key: draw(turns()) if value is None else value}
    for media in ("image", "images", "video"):
        if draw(st.integers(0, 3)) == 0:
            listed = st.lists(PICTURE, max_size=2)
            record[media] = draw(st.one_of(PICTURE, PICTURE, listed, JUNK))
    return draw(st.sampled_from((record, record, record, draw(JUNK))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    hovle = processor_from_folder(write_hovle(tmp_path_factory.mktemp("hovle")))
    return [hovle, TeacherProcessor(FAMILIES["qwen3_vl"].processor)]


def judge(source: Path, processor: TrainingProcessor | TeacherProcessor) -> dict[str, str]:
    """The reasons of bad samples, which are the same for everything that reads data."""
    corpus = open_corpus(source, source.parent)
    report = check_data(corpus, processor, MAX_LENGTH)
    bad = {sample.name: sample.reason for sample in report.bad}
    index = build_index(corpus, processor, index_key(corpus, processor))
    for found in (None, index):
        loader = StepLoader(
            corpus, processor, batch_size=len(corpus), max_length=MAX_LENGTH, index=found
        )
        step = loader.step(0)
        assert {sample.name: sample.reason for sample in step.bad} == bad
        trained = sum(micro.num_samples for micro in step.micro_batches)
        assert trained + len(bad) == len(corpus) == report.samples
    for reason in bad.values():
        assert len(reason) > 10 and not PYTHON.search(reason), reason
    written = source.with_suffix(".index")
    written.write_bytes(index.to_bytes())
    again = read_index(written)
    assert [again.reason(n) for n in range(len(corpus))] == [
        index.reason(n) for n in range(len(corpus))
    ]
    return bad


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(found=st.lists(records(), min_size=1, max_size=6), as_list=st.booleans())
def test_every_sample_is_named_or_trained(
    folder: Path, processors: list[Any], found: list[Any], as_list: bool
) -> None:
    file = folder / ("train.json" if as_list else "train.jsonl")
    text = json.dumps(found) if as_list else "\n".join(map(json.dumps, found))
    file.write_text(text)
    for processor in processors:
        judge(file, processor)


@pytest.mark.filterwarnings("ignore::mmmamba_cli.errors.MmmambaWarning")
def test_each_picture(folder: Path, processors: list[Any]) -> None:
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    lines = [json.dumps({"image": [name], "conversations": said}) for name in PICTURES]
    (folder / "train.jsonl").write_text("\n".join(lines))
    # The processor of Qwen3-VL takes no picture that is 200 times as wide as high.
    for processor, number_good in zip(processors, (6, 5), strict=True):
        bad = judge(folder / "train.jsonl", processor)
        expected = set(range(number_good + 1, len(PICTURES) + 1))
        assert {int(name.partition(":")[2]) for name in bad} == expected, bad


def test_unusual_conversations(folder: Path, processors: list[Any]) -> None:
    """Thousands of turns, empty answers, no answer, answers beyond the maximum length."""

    def talk(*said: str) -> dict[str, Any]:
        roles = ("human", "gpt")
        return {
            "conversations": [
                {"from": roles[number % 2], "value": text} for number, text in enumerate(said)
            ]
        }

    samples = [talk("Hm?"), talk("Hm?", ""), talk("Hm? " * 800, "A"), talk(*["Hm?", "So."] * 1500)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, samples)))
    unanswered = {"train.jsonl:1": "the conversation ends without an answer"}
    for processor in processors:
        bad = judge(folder / "train.jsonl", processor)
        report = check_data(open_corpus(folder / "train.jsonl"), processor, MAX_LENGTH)
        assert (report.empty_answers, report.without_answer) == (1, 1)
        if isinstance(processor, TeacherProcessor):
            (reason,) = (bad.pop(name) for name in list(bad) if name == "train.jsonl:4")
            assert reason.startswith("there are 3,000 turns, at most 512 are possible")
        assert bad == unanswered


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_indexes(folder: Path, processors: list[Any], data: st.DataObject) -> None:
    """An index that is cut, or has other bytes, is refused, or has all its samples."""
    file = folder / "small.jsonl"
    file.write_text('{"text": "a cat"}\n{"text": ""}\n{"text": "a"}\n{"tex": 1}')
    corpus = open_corpus(file)
    key = index_key(corpus, processors[0])
    content = build_index(corpus, processors[0], key).to_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    start = data.draw(st.integers(0, header + 40))
    noise = data.draw(
        st.one_of(st.binary(max_size=3), st.sampled_from((b"9" * 9, b"-", b"[" * 999)))
    )
    way = data.draw(st.sampled_from(("cut", "replace", "insert")))
    rest = {"cut": 0, "replace": start + len(noise), "insert": start}[way]
    spoiled = content[:start] + (noise + content[rest:] if way != "cut" else b"")
    written = folder / "small.index"
    written.write_bytes(spoiled)
    try:
        index = read_index(written)
    except DataError as error:
        assert not PYTHON.search(error.message)
        return
    assert way != "cut"
    index.summary(50)
    for sample in range(len(index)):
        index.reason(sample)
