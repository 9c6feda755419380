"""Lazy references to the pictures of a suite, in files or in a table."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.vlmeval_table import PICTURE, VLMEvalTable, split_cell

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One picture of a row: a file, or picture number `part` in a cell of a table.

    `enlarge` is the factor by which it is scaled up before tiling.
    """

    row: str
    file: Path | None = None
    table: VLMEvalTable | None = None
    owner: str = ""
    part: int = 0
    enlarge: int = 1

    def source(self) -> Path | bytes:
        """The file or the bytes. Raises `DataError` that names the row for bad base64."""
        if self.file is not None:
            return self.file
        assert self.table is not None
        cell = self.table.image_cell(self.owner)
        return decode(split_cell(cell)[self.part], f"{self.table.file}: row {self.row}")

    def size(self) -> tuple[int, int]:
        """Enlarged (width, height), read from the header only. Raises `DataError`."""
        from mmmamba_cli.processing import image_size

        width, height = image_size(self.source(), label=f"the image of row {self.row}")
        return width * self.enlarge, height * self.enlarge

    def open(self) -> Image:
        """The picture as RGB, bilinearly enlarged. Raises `DataError`."""
        from PIL import Image as pil

        from mmmamba_cli.processing import open_image

        image = open_image(self.source(), label=f"the image of row {self.row}")
        if self.enlarge == 1:
            return image
        size = (image.width * self.enlarge, image.height * self.enlarge)
        return image.resize(size, pil.Resampling.BILINEAR)


def pictures_of(
    table: VLMEvalTable, cell: Mapping[str, str], dataset: str, enlarge: int = 1
) -> tuple[Picture, ...]:
    """The pictures of a row, the first enlarged. Raises `DataError` if a file does not exist."""
    index, owner = cell["index"], cell[PICTURE]
    if owner:
        return tuple(
            Picture(index, table=table, owner=owner, part=i, enlarge=1 if i else enlarge)
            for i in range(table.pictures[owner])
        )
    names = split_cell(cell.get("image_path", ""))
    return tuple(
        Picture(index, file=_find(table.file, name, dataset, index), enlarge=1 if i else enlarge)
        for i, name in enumerate(names)
        if name
    )


def _find(table: Path, name: str, dataset: str, index: str) -> Path:
    """The file of a picture: relative to the table, in VLMEvalKit's layout, or the path itself."""
    folder = table.parent
    # Beside the table first: the current folder may have another file of that name.
    places = [folder / name, folder / "images" / dataset / name, Path(name)]
    for place in places:
        if _is_there(place):
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise DataError(
        f"{table}: the picture {name} of row {index} is in none of {looked}",
        "put it there, or use a table with the column image",
    )


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or not one the system can encode
        return False


def decode(text: str, where: str) -> bytes:
    """Bytes of base64. Raises `DataError` naming `where`."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{where}: the image is not valid base64: {error}", "write the table again"
        ) from error
