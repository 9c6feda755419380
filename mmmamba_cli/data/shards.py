"""webdataset shards: tar files whose members of one key make a sample."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from mmmamba_cli.data.samples import Sample, Stored, given, member_key, parse_sample
from mmmamba_cli.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MAX_SHARDS = 1_000_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_shards(source: str) -> list[Path]:
    """`part-{000..002}.tar` as three paths. Raises `DataError` for a range that runs backwards."""
    match = RANGE.search(source)
    if match is None:
        return [Path(source)]
    first, last = match[1], match[2]
    if int(first) > int(last):
        raise DataError(f"{source}: the range {match[0]} runs backwards")
    if int(last) - int(first) >= MAX_SHARDS:
        raise DataError(f"{source}: the range {match[0]} names more than {MAX_SHARDS} files")
    width = len(first)
    names = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    return [Path(source[: match.start()] + name + source[match.end() :]) for name in names]


class Shard:
    """One tar file. Members are indexed once and read where they lie; nothing is extracted."""

    def __init__(self, file: Path):
        self.file = file
        self._members: dict[str, Stored] = {}
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isreg():
                        self._members[member.name] = Stored(file, member.offset_data, member.size)
                end = tar.offset
            # tarfile takes a header it cannot read for the end, which is a block of zeros.
            if any(Stored(file, end, tarfile.BLOCKSIZE).read()):
                raise tarfile.ReadError(f"it is damaged at byte {end}")
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist", "check the path") from error
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"{file} is not a tar file that can be read: {error}", "shards are not compressed"
            ) from error
        # Members with a sample in them, and the pictures of each key.
        self._samples: list[str] = []
        self._pictures: dict[str, list[str]] = {}
        for name in self._members:
            key, extension = member_key(name)
            if extension == "json":
                self._samples.append(name)
            elif extension.rpartition(".")[2] in IMAGES:
                self._pictures.setdefault(key, []).append(name)

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
        key = member_key(member)[0]
        own = self._pictures.get(key)
        if isinstance(record, dict) and own and given(record, "image", "images") is None:
            record = {**record, "image": sorted(own)}
        return parse_sample(record, name, self._finder(key))

    def _finder(self, key: str) -> Callable[[str], Stored]:
        def find(image: str) -> Stored:
            # By its member name, beside the sample, or under the sample's own key.
            beside = str(Path(key).parent / image)
            under_key = f"{key}.{member_key(image)[1]}"
            for candidate in (image, beside, under_key):
                if candidate in self._members:
                    return self._members[candidate]
            raise DataError(f"image {image} is not in the shard")

        return find
