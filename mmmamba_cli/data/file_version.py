"""Files of training data as they were when they were opened, so that a change is noticed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.errors import DataError


@dataclass(frozen=True)
class FileVersion:
    """A file as it was when it was opened; one that was written again is another.

    Attributes:
        size: in bytes.
        modified: in nanoseconds.
    """

    path: Path
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """The file as it is now. Raises `OSError`."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def check_unchanged(self) -> None:
        """Raise `DataError` if the file was written since, `OSError` if it is gone."""
        if FileVersion.of(self.path) != self:
            raise DataError(
                f"{self.path} changed after it was opened",
                "run the command again once it does not change any more",
            )

    def check_size(self, descriptor: int | None = None) -> None:
        """Raise `DataError` if the file, or the one open as `descriptor`, has another size.

        The time is not compared: a file may be touched during a long training. Raises `OSError` if
        it is gone.
        """
        size = (self.path.stat() if descriptor is None else os.fstat(descriptor)).st_size
        if size != self.size:
            raise DataError(
                f"{self.path} changed after it was opened: it had {self.size:,} bytes and has "
                f"{size:,}",
                "run the command again once it does not change any more",
            )
