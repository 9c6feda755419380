"""webdataset shards: tar files in which members with the same key form a sample."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mmmamba_cli.data.file_version import FileVersion
from mmmamba_cli.data.sample import FileSlice, Sample, first_present, parse_sample
from mmmamba_cli.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
RECORD = ".json"
MAX_SHARDS = 1_000_000
# Numbers of more digits are not shard numbers.
RANGE = re.compile(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}")
DIGITS = re.compile(r"([0-9]+)")


def expand_shards(source: str) -> list[Path]:
    """Expand `part-{000..002}.tar` to three paths. Raises `DataError` for a bad range."""
    match = RANGE.search(source)
    if match is None:
        return [Path(source)]
    first, last = match[1], match[2]
    if int(first) > int(last):
        raise DataError(f"{source}: the range {match[0]} runs backwards")
    if int(last) - int(first) >= MAX_SHARDS:
        raise DataError(f"{source}: the range {match[0]} names more than {MAX_SHARDS} files")
    if RANGE.search(source, match.end()):
        raise DataError(f"{source}: has two ranges, expected one")
    width = len(first)
    names = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    return [Path(source[: match.start()] + name + source[match.end() :]) for name in names]


def natural_key(name: str) -> tuple[tuple[int, str, int], ...]:
    """Sort key that compares numbers in names by value: `a.2.png` before `a.10.png`."""
    # Text and numbers alternate. Numbers are compared as digit strings, because `int` limits their
    # length; of equal numbers the one with fewer leading zeros comes first.
    return tuple(
        (len(piece.lstrip("0")), piece.lstrip("0"), len(piece)) if place % 2 else (0, piece, 0)
        for place, piece in enumerate(DIGITS.split(name))
    )


class Shard:
    """One tar file. Members are indexed once and read in place, without extraction.

    A member `key.json` is a sample; `key.png`, `key.0.png`, ... are its pictures, in natural order
    of their names. A key may contain dots: a picture belongs to the longest key that is a prefix of
    its name. `ignored` lists all other members with the reason.
    """

    def __init__(self, file: Path):
        self.file = file
        self._members: dict[str, FileSlice] = {}
        self.ignored: list[str] = []
        self.pictures: dict[str, FileSlice] = {}
        try:
            self.version = FileVersion.of(file)
            self._index()
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist", "check the path") from error
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"{file} is not a tar file that can be read: {error}", "shards are not compressed"
            ) from error
        self._samples: list[str] = []
        self._pictures: dict[str, list[str]] = {}
        self._sort_members()

    def _index(self) -> None:
        """Record offset and size of each member."""
        with tarfile.open(self.file, "r:") as tar:
            for member in tar:
                if member.isreg():
                    if member.name in self._members:
                        self._ignore(member.name, "an earlier member of the same name")
                    self._members[member.name] = FileSlice(
                        self.version, member.offset_data, member.size
                    )
                elif member.islnk() and member.linkname in self._members:
                    self._members[member.name] = self._members[member.linkname]
                elif not member.isdir():
                    self._ignore(member.name, "no file")
            end = tar.offset
        # tarfile stops at an unreadable header as if it were the end, which is a block of zeros.
        if any(FileSlice(self.version, end, tarfile.BLOCKSIZE).read()):
            raise tarfile.ReadError(f"it is damaged at byte {end}")

    def _sort_members(self) -> None:
        """Sort members into samples, pictures of each sample, and ignored members."""
        records = {
            name[: -len(RECORD)]: name
            for name in self._members
            if name.lower().endswith(RECORD) and PurePosixPath(name).stem
        }
        for key, name in records.items():
            # `a.seg.json` beside `a.json` is an annotation of sample `a`, not a sample.
            if any(shorter in records for shorter in _shorter_keys(key)):
                self._ignore(name, "a second .json of its sample")
            else:
                self._samples.append(name)
        keys = {name[: -len(RECORD)] for name in self._samples}
        for name in self._members:
            if name in records.values():
                continue
            if PurePosixPath(name).suffix.lower().removeprefix(".") not in IMAGES:
                self._ignore(name, "neither .json nor a picture")
                continue
            self.pictures[name] = self._members[name]
            key = next((one for one in _shorter_keys(name) if one in keys), "")
            # Without a key it is not ignored: a sample may still name it.
            if key:
                self._pictures.setdefault(key, []).append(name)
        for names in self._pictures.values():
            names.sort(key=natural_key)

    def _ignore(self, name: str, reason: str) -> None:
        self.ignored.append(f"{self.file.name}/{name}: {reason}")

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """`shard/member`."""
        return f"{self.file.name}/{self._samples[index]}"

    def __getitem__(self, index: int) -> Sample:
        member, name = self._samples[index], self.name(index)
        try:
            record = json.loads(self._members[member].read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: is not JSON: {error}") from error
        except DataError as error:
            raise DataError(f"{name}: {error.message}") from error
        key = member[: -len(RECORD)]
        pictures = self._pictures.get(key)
        if (
            isinstance(record, dict)
            and pictures
            and first_present(record, "image", "images") is None
        ):
            record = {**record, "image": pictures}
        return parse_sample(record, name, self._finder(key))

    def _finder(self, key: str) -> Callable[[str], FileSlice]:
        def find(image: str) -> FileSlice:
            # By member name, relative to the sample, or by the sample's key and the suffix.
            beside = str(PurePosixPath(key).parent / image)
            under_key = f"{key}.{PurePosixPath(image).name.partition('.')[2]}"
            for candidate in (image, beside, under_key):
                if candidate in self._members:
                    return self._members[candidate]
            raise DataError(f"image {image} is not in the shard")

        return find


def _shorter_keys(name: str) -> Iterator[str]:
    """Prefixes of a member's name at its dots, longest first: `a/b.0.png` gives `a/b.0`, `a/b`."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if base:
            yield f"{folder}{slash}{base}"
