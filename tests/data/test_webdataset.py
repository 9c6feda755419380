"""webdataset shards: pictures of each sample, their order, and members of no sample."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmmamba_cli.data import check_data, open_corpus
from mmmamba_cli.data.webdataset import expand_shards, natural_key
from mmmamba_cli.errors import DataError, MmmambaWarning
from mmmamba_cli.processing import HolisticVLMProcessor

TALK = json.dumps(
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
).encode()


def picture(width: int) -> bytes:
    stored = io.BytesIO()
    Image.new("RGB", (width, 4), "red").save(stored, "PNG")
    return stored.getvalue()


def write_shard(file: Path, *members: tuple[str, bytes | str]) -> Path:
    """Write files, and hard links for contents that are names."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, None if isinstance(content, str) else io.BytesIO(content))
    return file


def widths(sample: Any) -> list[int]:
    return [Image.open(io.BytesIO(one.read())).width for one in sample.images]


def test_pictures_are_in_natural_order(tmp_path: Path) -> None:
    """For any order of the members; names without a number and with one and two digits."""
    names = ["a.png", *(f"a.{number}.png" for number in range(12)), "a.x.png"]
    members = [(name, picture(place + 1)) for place, name in enumerate(names)]
    file = write_shard(tmp_path / "s.tar", *members[::-1], ("a.json", TALK))
    assert widths(open_corpus(file)[0]) == [*range(2, 14), 1, 14]
    padded = [(f"b.{number:04}.png", picture(number)) for number in (1, 2, 10, 100)]
    file = write_shard(tmp_path / "t.tar", ("b.json", TALK), *padded[::-1])
    assert widths(open_corpus(file)[0]) == [1, 2, 10, 100]


@given(st.lists(st.tuples(st.integers(0, 10**30), st.integers(0, 3))))
def test_natural_order_compares_numbers_by_value(numbers: list[tuple[int, int]]) -> None:
    names = [f"a/talk.{'0' * zeros}{number}.png" for number, zeros in numbers]
    ordered = sorted(names, key=natural_key)
    values = [int(name.split(".")[1]) for name in ordered]
    assert values == sorted(values)


def test_a_number_of_5000_digits_is_a_number() -> None:
    long = "9" * 5000
    assert sorted([f"a.1{long}", f"a.{long}", "a.b"], key=natural_key)[1] == f"a.1{long}"


def test_keys_with_dots(tmp_path: Path) -> None:
    """A picture belongs to the longest key that is a prefix; folders may have dots too."""
    file = write_shard(
        tmp_path / "s.tar",
        ("v1.2/img.v1.2.json", TALK),
        ("v1.2/img.v1.2.png", picture(1)),
        ("v1.2/img.v1.3.json", TALK),
        ("v1.2/img.v1.3.0.PNG", picture(2)),
        ("v1.2/img.v1.3.1.png", picture(3)),
        ("c.JSON", TALK),
        ("c.seg.png", picture(4)),
    )
    corpus = open_corpus(file)
    assert [corpus.name(i) for i in range(3)] == [
        "s.tar/v1.2/img.v1.2.json",
        "s.tar/v1.2/img.v1.3.json",
        "s.tar/c.JSON",
    ]
    assert [widths(corpus[i]) for i in range(3)] == [[1], [2, 3], [4]]
    assert corpus.ignored == ()


def test_ignored_members_are_listed_and_counted(
    tmp_path: Path, processor: HolisticVLMProcessor
) -> None:
    named = json.loads(TALK) | {"image": "shared/one.png"}
    file = write_shard(
        tmp_path / "s.tar",
        ("a.json", TALK),
        ("a.png", picture(1)),
        ("a.txt", b"a caption"),
        ("a.meta.json", b"{}"),
        ("a.1.png", "a.png"),
        ("b.json", json.dumps(named).encode()),
        ("shared/one.png", picture(2)),
        ("shared/two.png", picture(3)),
        ("c.png", "gone.png"),
        ("a.txt", b"again"),
    )
    warned = r"s\.tar: 4 members belong to no sample \(s\.tar/c\.png: no file, .* and 1 more\)"
    with pytest.warns(MmmambaWarning, match=warned):
        corpus = open_corpus(file)
    report = check_data(corpus, processor, 300)
    assert (report.samples, report.bad, report.images) == (2, [], 3)
    assert sorted(report.ignored) == [
        "s.tar/a.meta.json: a second .json of its sample",
        "s.tar/a.txt: an earlier member of the same name",
        "s.tar/a.txt: neither .json nor a picture",
        "s.tar/c.png: no file",
        "s.tar/shared/two.png: a picture that no sample shows",
    ]
    found = report.as_dict()
    assert found["ignored"] == 5
    assert found["ignored_names"] == report.ignored
    # After a part of the samples, unused pictures are unknown.
    part = check_data(corpus, processor, 300, limit=1)
    assert len(part.ignored) == 4


def test_ranges(tmp_path: Path) -> None:
    names = [path.name for path in expand_shards("part-{8..11}.tar")]
    assert names == ["part-8.tar", "part-9.tar", "part-10.tar", "part-11.tar"]
    with pytest.raises(DataError, match="has two ranges"):
        expand_shards("part-{0..1}-{0..3}.tar")
    with pytest.raises(DataError, match="does not exist"):
        open_corpus(f"part-{{0..{'9' * 5000}}}.tar"[:200] + ".tar")
