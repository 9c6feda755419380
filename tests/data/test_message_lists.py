"""Conversations as lists: contents of parts, and files with one list."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_reading import GOOD, lines, refused

from mmmamba_cli.data import SampleEncoder, open_corpus
from mmmamba_cli.data.jsonl import JsonList
from mmmamba_cli.data.sample import parse_sample
from mmmamba_cli.processing import HolisticVLMProcessor

PART = {"type": "text", "text": "What is it, <image> or not?"}


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}


def in_parts(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}, ANSWER]


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"messages": in_parts(PART)}, []),
        ({"images": ["a.png"], "messages": in_parts({"type": "image"}, PART)}, ["a.png"]),
        ({"messages": in_parts({"type": "image", "image": "a.png"}, PART)}, ["a.png"]),
        ({"messages": in_parts({"type": "image", "path": "a.png"}, PART)}, ["a.png"]),
        (
            {"messages": in_parts({"type": "image_url", "image_url": {"url": "a.png"}}, PART)},
            ["a.png"],
        ),
        (
            {
                "image": ["b.png", "c.png"],
                "messages": [
                    *in_parts({"type": "image", "image": "a.png"}, {"type": "image"}, PART),
                    {"role": "user", "content": "<image> and this?"},
                    ANSWER,
                ],
            },
            ["a.png", "b.png", "c.png"],
        ),
        # Pictures that no turn places come before the first question.
        ({"image": "a.png", "messages": in_parts(PART)}, ["a.png"]),
    ],
)
def test_contents_as_lists_of_parts(
    record: Any, images: list[str], tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (8 + number, 8)).save(tmp_path / name)
    corpus = open_corpus(lines(tmp_path / "a.jsonl", record), tmp_path)
    sample = corpus[0]
    assert [Path(str(one)).name for one in sample.images] == images
    encoded = SampleEncoder(processor, 400, None)(sample)
    assert encoded.ids.count(processor.image_token_id) == 4 * len(images)
    assert PART["text"] in processor.decode(encoded.ids)
    assert processor.decode(
        [i for i, mine in zip(encoded.ids, encoded.is_answer, strict=True) if mine]
    ).startswith("Red.<|im_end|>")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "audio"}], "turn 1 has {'type': 'audio'} among its parts"),
        (["text"], "turn 1 has 'text' among its parts"),
        ([{"type": "text", "text": 3}], "turn 1 has {'type': 'text', 'text': 3} among"),
        ([{"type": "image", "image": 3}], "turn 1 has an image that is 3"),
        ([{"type": "image", "bytes": "x"}], "turn 1 has an image that is None"),
        ([{"type": "image", "url": "https://x.org/a.png"}], "download it first"),
    ],
)
def test_malformed_parts(parts: Any, message: str) -> None:
    text = refused(lambda: parse_sample({"messages": in_parts(*parts)}, "set.jsonl:3", Path))
    assert text.startswith("set.jsonl:3")
    assert message in text
    shown = [*in_parts(PART)[:1], {"role": "assistant", "content": [{"type": "image"}]}]
    assert "only the user shows any" in refused(
        lambda: parse_sample({"messages": shown}, "set.jsonl:3", Path)
    )


def test_a_list_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks may end inside items, inside multi-byte characters and between digits."""
    items = [{**GOOD, "id": n, "remark": "ö→🐼" * (n % 5), "n": 10**n} for n in range(40)]
    for number, text in enumerate(
        (
            json.dumps(items),
            json.dumps(items, indent=1, ensure_ascii=False),
            "\ufeff \n" + json.dumps(items, ensure_ascii=False) + "\r\n",
        )
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(text, encoding="utf-8")
        for block in (1, 7, 1 << 22):
            monkeypatch.setattr("mmmamba_cli.data.jsonl.LIST_BLOCK_BYTES", block)
            corpus = open_corpus(file)
            assert [corpus.records[i] for i in range(len(corpus))] == items  # type: ignore[attr-defined]
            assert corpus.name(2) == f"{number}.json:3"
            assert corpus[39].messages == ({"role": "user", "content": "Hi"}, corpus[0].messages[1])
    numbers = tmp_path / "numbers.json"
    numbers.write_text("[1, 23, 456]")
    monkeypatch.setattr("mmmamba_cli.data.jsonl.LIST_BLOCK_BYTES", 1)
    assert [JsonList(numbers)[i] for i in range(3)] == [1, 23, 456]
    assert "numbers.json:2: is a int" in refused(lambda: open_corpus(numbers)[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a" 2}]', "not a JSON list: item 2: Expecting ':'"),
        ('[{"a": 1} {"a": 2}]', "item 2: expected , or ] after it"),
        ('[{"a": 1},]', "item 2: expected a conversation after the comma"),
        ('[{"a": 1}', "item 2: expected , or ]"),
        ('[{"a": 1}] x', "there is text after the list"),
        ("[" * 100_000, "not a JSON list: item 1"),
        ("[]", "has no samples"),
    ],
)
def test_malformed_lists(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mix.json"
    file.write_text(text)
    assert message in refused(lambda: open_corpus(file))
    file.write_bytes(b'[{"a": "\xff"}]')
    assert "not valid UTF-8" in refused(lambda: open_corpus(file))


def test_a_list_in_a_meta_file(tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text(json.dumps([GOOD, GOOD]))
    meta = tmp_path / "meta.json"
    meta.write_text("\ufeff" + json.dumps({"one": {"annotation": "mix.json"}}), encoding="utf-8")
    assert [open_corpus(meta).name(i) for i in range(2)] == ["mix.json:1", "mix.json:2"]


def test_a_list_is_not_held_in_memory(tmp_path: Path) -> None:
    """Indexing and reading 24 MB of conversations needs far less memory."""
    talk = {"conversations": [{"from": "human", "value": "x" * 20_000}, GOOD["conversations"][1]]}
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([talk] * 1200))
    tracemalloc.start()
    corpus = open_corpus(file)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus) == 1200
    assert held < 200_000
    assert most < file.stat().st_size
