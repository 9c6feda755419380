"""webdataset shards: tar files whose members of one key make a sample."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from mmmamba_cli.data.samples import Sample, member_key, parse_sample
from mmmamba_cli.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_shards(source: str) -> list[Path]:
    """`part-{000..002}.tar` as three paths. Raises `DataError` for a range that runs backwards."""
    match = RANGE.search(source)
    if match is None:
        return [Path(source)]
    first, last = match[1], match[2]
    if int(first) > int(last):
        raise DataError(f"{source}: the range {match[0]} runs backwards")
    width = len(first)
    names = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    return [Path(source[: match.start()] + name + source[match.end() :]) for name in names]


class Shard:
    """One tar file. Members are indexed once and read where they lie; nothing is extracted."""

    def __init__(self, file: Path):
        self.file = file
        self._members: dict[str, tuple[int, int]] = {}
        self._keys: list[str] = []
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isreg():
                        self._members[member.name] = (member.offset_data, member.size)
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist", "check the path") from error
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(
                f"{file} is not a tar file that can be read: {error}", "shards are not compressed"
            ) from error
        self._keys = [name for name in self._members if member_key(name)[1] == "json"]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        member = self._keys[index]
        name = f"{self.file.name}/{member}"
        try:
            record = json.loads(self._read(member))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: is not JSON: {error}") from error
        key = member_key(member)[0]
        own = [m for m in self._members if member_key(m)[0] == key and _is_image(m)]
        if isinstance(record, dict) and own and "image" not in record and "images" not in record:
            record = {**record, "image": sorted(own)}
        return parse_sample(record, name, self._finder(key))

    def _finder(self, key: str) -> Callable[[str], bytes]:
        def find(image: str) -> bytes:
            # By its member name, beside the sample, or under the sample's own key.
            beside = str(Path(key).parent / image)
            under_key = f"{key}.{member_key(image)[1]}"
            for candidate in (image, beside, under_key):
                if candidate in self._members:
                    return self._read(candidate)
            raise DataError(f"image {image} is not in the shard")

        return find

    def _read(self, member: str) -> bytes:
        offset, size = self._members[member]
        with self.file.open("rb") as handle:
            handle.seek(offset)
            return handle.read(size)


def _is_image(name: str) -> bool:
    return member_key(name)[1].rpartition(".")[2] in IMAGES
