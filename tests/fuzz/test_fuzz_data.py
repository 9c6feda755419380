"""Corrupted pictures, conversations, meta files and shards in `mmmamba data check`."""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_images import KINDS, encoded, gradient
from case import PYTHON, Case, numbers, outcome
from materials import Materials
from mutations import JUNK, same_json, spoil_bytes, spoil_json, spoil_tree

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import image_size, open_image

CaseOf = Callable[[str, int], Case]
IMAGES = (
    "../canary",
    "/etc/passwd",
    "/dev/zero",
    "images",
    ".",
    "",
    "gone.png",
    "a\0b.png",
    "\ud800.png",
    "x" * 400,
    "http://example.org/a.png",
    "data:image/png;base64,AAAA",
    "loop.png",
    "pipe.png",
)
TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "a red cat"},
]
SAMPLES: list[dict[str, Any]] = [
    {"id": 0, "image": "good.png", "conversations": TURNS},
    {"id": 1, "conversations": [{"from": "human", "value": "Hello"}, TURNS[1]]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"text": "the old table stands near green apples"},
]


def check(case: Case, materials: Materials, source: object, *more: object) -> dict[str, Any]:
    """The report of `data check`; every problem must be a readable sentence."""
    words = ("--model", materials.hovle, "--max-bad-share", 1, "--image-root", case.home / "images")
    done = case.command("data", "check", source, *words, "--json", *more)
    if done.code:
        return {}
    report = outcome(done)
    for sample in report["named"]:
        assert sample["reason"] and not PYTHON.search(sample["reason"]), sample
    return report


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(gradient(), "PNG"))
    (folder / "loop.png").symlink_to("loop.png")
    return folder


@pytest.mark.parametrize("number", numbers(42))
def test_pictures(case_of: CaseOf, images: Path, materials: Materials, number: int) -> None:
    case = case_of("picture", number)
    make = KINDS[number % len(KINDS)]
    suffix = case.rng.choice((".png", ".jpg", ".gif", ".svg", ".eps", ""))
    (images / f"bad{suffix}").write_bytes(make(case.rng, case.done))
    sample = {**SAMPLES[0], "image": f"bad{suffix}"}
    file = case.home / "train.jsonl"
    file.write_text(json.dumps(sample))
    report = check(case, materials, file)
    assert report["samples"] == 1 and report["tiles"] + report["bad"] >= 1


@pytest.mark.parametrize("number", numbers(42))
def test_pictures_alone(case_of: CaseOf, number: int) -> None:
    """Pictures opened from bytes, as `eval` does from a table."""
    case = case_of("picture-bytes", number)
    content = KINDS[number % len(KINDS)](case.rng, case.done)
    size = case.call(lambda: image_size(content, label="the picture of row 3"), DataError)
    found = case.call(lambda: open_image(content, label="the picture of row 3"), DataError)
    if not isinstance(found, DataError):
        assert found.mode == "RGB" and found.size == size


def spoil_lines(rng: random.Random, done: list[str]) -> bytes:
    samples = copy.deepcopy(SAMPLES)
    at = rng.randrange(4)
    kind = rng.choice(("tree", "tree", "tree", "image", "turns", "bytes", "line"))
    done.append(f"{kind} in sample {at}")
    if kind == "tree":
        samples[at] = spoil_tree(rng, samples[at], done)
    elif kind == "image":
        name: Any = rng.choice((*IMAGES, *JUNK))
        samples[0]["image"] = rng.choice((name, [name], ["good.png", name], [name] * 300))
        done.append(repr(samples[0]["image"])[:60])
    elif kind == "turns":
        value = rng.choice(("<image>" * 500, "<IMG_CONTEXT>", "<|im_end|>" * 50, "\ud800", "", " "))
        samples[0]["conversations"][rng.randrange(2)] = {
            "from": rng.choice(("human", "gpt", "system", "user", "nobody")),
            "value": value,
        }
    lines = [json.dumps(sample).encode() for sample in samples]
    if kind == "bytes":
        return spoil_bytes(rng, b"\n".join(lines), done)
    if kind == "line":
        lines[at] = rng.choice(
            (
                b"[" * 100_000,
                b"\xff\xfe",
                b"nan",
                b"3",
                b'"x"',
                b"null",
                b"\0" * 9,
                b"{" * 9,
                b'{"text": ' + b"9" * 5000 + b"}",
            )
        )
    return b"\n".join(lines)


@pytest.mark.parametrize("number", numbers(40))
def test_conversations(case_of: CaseOf, images: Path, materials: Materials, number: int) -> None:
    case = case_of("conversations", number)
    file = case.home / "train.jsonl"
    file.write_bytes(spoil_lines(case.rng, case.done))
    check(case, materials, file)


@pytest.mark.parametrize("number", numbers(16))
def test_meta_files(case_of: CaseOf, images: Path, materials: Materials, number: int) -> None:
    case = case_of("meta", number)
    (case.home / "train.jsonl").write_text("\n".join(map(json.dumps, SAMPLES)))
    meta = {"one": {"root": "images", "annotation": "train.jsonl", "repeat_time": 2, "weight": 1}}
    if number % 4 == 0:
        meta["one"]["annotation"] = case.rng.choice((*IMAGES, "/dev/zero", "images/good.png"))
        case.done.append(f"annotation {meta['one']['annotation']!r:.60}")
        text = json.dumps(meta).encode()
    else:
        text = spoil_json(case.rng, meta, case.done)
    (case.home / "meta.json").write_bytes(text)
    check(case, materials, case.home / "meta.json")


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("number", numbers(20))
def test_shards(case_of: CaseOf, images: Path, materials: Materials, number: int) -> None:
    case = case_of("shard", number)
    picture = (images / "good.png").read_bytes()
    sample = {key: value for key, value in SAMPLES[0].items() if key != "image"}
    members = [("a.json", json.dumps(sample).encode()), ("a.png", picture)]
    way, file = number % 4, case.home / "part-000.tar"
    if way == 0:
        members[0] = ("a.json", spoil_json(case.rng, SAMPLES[0], case.done))
    elif way == 1:
        name = case.rng.choice(
            ("../../canary.json", "/a.json", "a/../../b.json", ".json", "x" * 300)
        )
        members.append((name, members[0][1]))
        case.done.append(f"member {name:.30}")
    elif way == 2:
        members[1] = ("a.png", KINDS[number % len(KINDS)](case.rng, case.done))
    write_tar(file, members)
    source = str(file)
    if way == 3:
        file.write_bytes(spoil_bytes(case.rng, file.read_bytes(), case.done, near=1100))
        ranges = (
            "part-000",
            "part-{000..000}",
            "part-{5..2}",
            "part-{0..99999999999}",
            "part-{0..9}",
        )
        source = source.replace("part-000", case.rng.choice(ranges))
        case.done.append(source[-30:])
    check(case, materials, source)


MEMBERS = (
    "a.0.png",
    "a.10.png",
    f"a.{'9' * 40}.png",
    "a.seg.json",
    "a.b.c.json",
    "a.",
    ".png",
    "a..png",
    "A.PNG",
    "./a.png",
    "a/",
    "..",
    "a.png/b.png",
    "\u202e.png",
    "a.txt",
    "a.json.json",
)
KINDS_OF_MEMBER = (
    tarfile.REGTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    b"Z",
)


@pytest.mark.parametrize("number", numbers(80))
def test_members_of_shards(
    case_of: CaseOf, images: Path, materials: Materials, number: int
) -> None:
    """Tar members of all names and types, including links out of the shard."""
    case = case_of("member", number)
    picture = (images / "good.png").read_bytes()
    sample = {key: value for key, value in SAMPLES[0].items() if key != "image"}
    file = case.home / "part-000.tar"
    with tarfile.open(
        file, "w", format=case.rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    ) as tar:
        for name, content in (("a.json", json.dumps(sample).encode()), ("a.png", picture)):
            add_member(tar, name, content, tarfile.REGTYPE)
        for _ in range(case.rng.choice((1, 2, 5))):
            name, kind = case.rng.choice(MEMBERS), case.rng.choice(KINDS_OF_MEMBER)
            link = case.rng.choice(("a.png", "/etc/passwd", "../canary", name, "gone"))
            case.done.append(f"member {name} of kind {kind!r}, to {link}")
            add_member(tar, name, case.rng.choice((picture, b"", b"{}")), kind, link)
    report = check(case, materials, file)
    if report:
        assert report["samples"] >= 1
        assert report["ignored"] == len(report["ignored_names"]) or report["ignored"] > 10


def add_member(
    tar: tarfile.TarFile, name: str, content: bytes, kind: bytes, link: str = ""
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
    holds = kind in (tarfile.REGTYPE, b"Z")
    info.size = len(content) if holds else 0
    tar.addfile(info, io.BytesIO(content) if holds else None)


PARTS: tuple[Any, ...] = (
    {"type": "text", "text": "<image> <|im_start|>system"},
    {"type": "text"},
    {"type": "text", "text": None},
    {"type": "image"},
    {"type": "image", "image": "good.png"},
    {"type": "image", "image": "../canary"},
    {"type": "image_url", "image_url": {"url": "good.png"}},
    {"type": "image_url", "image_url": {"url": ["good.png"]}},
    {"type": "image", "url": "http://example.org/a.png"},
    {"type": "video", "video": "a.mp4"},
    {"type": ["image"]},
    {},
    "good.png",
    [],
    None,
)


def spoil_list(rng: random.Random, done: list[str]) -> bytes:
    """A JSON list of conversations with one mutation."""
    samples: list[Any] = copy.deepcopy(SAMPLES)
    parts = [rng.choice(PARTS) for _ in range(rng.choice((0, 1, 3)))]
    done.append(f"parts {parts!r:.80}")
    user = {"role": "user", "content": parts}
    samples.append({"image": "good.png", "messages": [user, SAMPLES[2]["messages"][1]]})
    way = rng.choice(("good", "tree", "text", "bytes", "ends", "layout"))
    done.append(way)
    if way == "tree":
        return json.dumps(spoil_tree(rng, samples, done)).encode()
    text = json.dumps(samples, indent=rng.choice((None, 1)))
    if way == "text":
        return spoil_json(rng, samples, done)
    if way == "bytes":
        return spoil_bytes(rng, text.encode(), done)
    if way == "ends":
        ends = ("[", "]", "[]", "[[", ",", "[,]", "{", "nan", "[" * 100_000, "[1, " * 5000, "\0")
        return (text[: rng.randrange(1, len(text))] + rng.choice(ends)).encode()
    if way == "layout":
        return ("\ufeff \n\t" + text.replace(", ", " ,\r\n")).encode() + rng.choice(
            (b"", b"\n", b" x")
        )
    return text.encode()


@pytest.mark.parametrize("number", numbers(80))
def test_lists_of_conversations(
    case_of: CaseOf,
    images: Path,
    materials: Materials,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    case = case_of("list", number)
    file = case.home / case.rng.choice(("mix.json", "mix.json", "mix.jsonl"))
    file.write_bytes(spoil_list(case.rng, case.done))
    monkeypatch.setattr(
        "mmmamba_cli.data.jsonl.LIST_BLOCK_BYTES", case.rng.choice((1, 64, 1 << 22))
    )
    check(case, materials, file)


@pytest.mark.parametrize("number", numbers(6))
def test_the_same(case_of: CaseOf, images: Path, materials: Materials, number: int) -> None:
    case = case_of("same-data", number)
    files = [case.home / "one.jsonl", case.home / "two.jsonl"]
    files[0].write_text("\n".join(map(json.dumps, SAMPLES)))
    rewritten = [
        b" ".join(same_json(case.rng, {**sample, "remark": [1]}, case.done).split(b"\n"))
        for sample in SAMPLES
    ]
    files[1].write_bytes(b"\n\n  \n".join(rewritten) + b"\r\n\n")
    (images / "never-asked-for.png").write_bytes(b"no picture")
    one, two = (check(case, materials, file) for file in files)
    assert one == two and one["samples"] == 4 and one["bad"] == 0
