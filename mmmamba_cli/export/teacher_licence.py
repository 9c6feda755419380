"""The licence of a teacher, which its student inherits: from its model card and licence files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.export.export_record import CARD_FILE

# Starts of the names of files that a licence requires copies to keep, in capitals.
LICENCE_FILE_STARTS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
LICENCE_FILE_SUFFIXES = ("", ".md", ".txt", ".pdf")


@dataclass(frozen=True)
class TeacherLicence:
    """A licence as a model card names it.

    Attributes:
        identifier: the field `license`, for example apache-2.0 or other; None if it is not known.
        name, link: `license_name` and `license_link`, which belong to `license: other`.
        files: licence texts and notices.
    """

    identifier: str | None = None
    name: str | None = None
    link: str | None = None
    files: tuple[Path, ...] = ()


def find_licence(folders: Iterable[Path]) -> TeacherLicence:
    """The licence in the first of `folders` that names one, and the licence files of the first
    that has any.

    A card that cannot be read, or whose licence is not one name, names none.
    """
    named = TeacherLicence()
    files: tuple[Path, ...] = ()
    for folder in folders:
        if not folder.is_dir():
            continue
        if named.identifier is None:
            named = _card_licence(folder / CARD_FILE)
        files = files or _licence_files(folder)
    return TeacherLicence(named.identifier, named.name, named.link, files)


def _card_licence(card: Path) -> TeacherLicence:
    import yaml
    from huggingface_hub import metadata_load

    try:
        fields: Any = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return TeacherLicence()
    identifier, name, link = (
        value if isinstance(value, str) else None
        for value in map(fields.get, ("license", "license_name", "license_link"))
    )
    return TeacherLicence() if identifier is None else TeacherLicence(identifier, name, link)


def _licence_files(folder: Path) -> tuple[Path, ...]:
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.name.upper().startswith(LICENCE_FILE_STARTS)
        and file.suffix.lower() in LICENCE_FILE_SUFFIXES
    )
