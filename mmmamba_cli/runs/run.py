"""A run directory: its teacher, its products and the current product, and its lock."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from mmmamba_cli.checkpoint import (
    AnyCheckpoint,
    Checkpoint,
    atomic_write_text,
    open_any_checkpoint,
    open_checkpoint,
    open_in_place,
    resolve_path,
)
from mmmamba_cli.checkpoint.atomic_writes import (
    interrupted_replacements,
    restore_hint,
    restore_interrupted,
)
from mmmamba_cli.checkpoint.checkpoint import NOT_YET_HINT, NOT_YET_IN_PLACE
from mmmamba_cli.errors import RunError, check_utf8
from mmmamba_cli.runs.manifest import MANIFEST, Manifest, Parent, read_json_as, read_manifest

RUN_RECORD = "run.json"
LOCK = ".lock"
PRODUCTS = "products"
PRODUCT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# In eval, profile and chat, --teacher is a switch and the path has its own option.
TEACHER_OPTIONS = "--teacher (--teacher-path of eval, profile and chat)"


class Teacher(BaseModel):
    """The checkpoint that a run started from; `digests` are SHA-256 by tensor name in the file.

    `in_place`: its students have mixers in the place of its attention, and are of its own class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    config: str | None
    arch: str | None
    content_hash: str
    digests: dict[str, str]
    in_place: bool = False

    @model_serializer(mode="wrap")
    def _leave_out_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Release 0.2 refuses fields that it does not know.
        fields: dict[str, Any] = dump(self)
        if not self.in_place:
            fields.pop("in_place", None)
        return fields


def recorded_path(path: Path) -> str:
    """A path as `run.json` records it: absolute. Raises `RunError` if that is not UTF-8."""
    found = str(path.resolve())
    check_utf8(found)
    return found


class RunRecord(BaseModel):
    """The contents of `run.json`. `teacher` is None if a student was imported without one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    teacher: Teacher | None
    current: str


class Run:
    """A run directory, which may not exist yet."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def exists(self) -> bool:
        return (self.folder / RUN_RECORD).is_file()

    @property
    def record(self) -> RunRecord:
        """The contents of `run.json`. Raises `RunError` if the folder is not a run."""
        if not self.exists:
            raise RunError(
                f"{self.folder} is not a run: it has no {RUN_RECORD}",
                "start one with `mmmamba seed CHECKPOINT`, or name another with --run",
            )
        return read_json_as(self.folder / RUN_RECORD, RunRecord)

    @property
    def teacher(self) -> Teacher:
        """The teacher. Raises `RunError` if the folder is not a run, or the run has no teacher."""
        teacher = self.record.teacher
        if teacher is None:
            raise RunError(
                f"{self.folder} has no teacher: its student was imported without one",
                "import it again with `mmmamba import CHECKPOINT --teacher PATH --overwrite`",
            )
        return teacher

    @property
    def is_in_place(self) -> bool:
        """Whether the students are transformers' models with mixers in the place of attention."""
        teacher = self.record.teacher
        return teacher is not None and teacher.in_place

    def product_folder(self, name: str) -> Path:
        return self.folder / PRODUCTS / name

    def interrupted_products(self) -> dict[str, Path]:
        """Products whose replacement was interrupted, and the hidden folders with their files.

        Those that killed processes of this machine left are restored and not returned.
        """
        folder = self.folder / PRODUCTS
        found = {
            name: restore_interrupted(folder / name) for name in interrupted_replacements(folder)
        }
        return {name: hidden for name, hidden in found.items() if hidden is not None}

    def products(self) -> dict[str, Manifest]:
        """Complete products by name, oldest first."""
        folder = self.folder / PRODUCTS
        if not folder.is_dir():
            return {}
        self.interrupted_products()
        names = [p.name for p in folder.iterdir() if (p / MANIFEST).is_file()]
        found = {name: self._manifest(name) for name in names if not name.startswith(".")}
        return dict(sorted(found.items(), key=lambda item: (item[1].created, item[0])))

    def ancestors(self, product: Manifest) -> Iterator[tuple[Parent, Manifest]]:
        """Yield the products that `product` was made from, nearest first.

        Each is yielded as (parent as recorded by its child, product that has this name now); their
        content hashes differ if the product was overwritten. The walk ends at a product without a
        parent in the run, or at a repeated name: a product can be overwritten by its descendant.
        """
        products, seen = self.products(), {product.name}
        while (parent := product.derived_from) is not None:
            if parent.name not in products or parent.name in seen:
                return
            seen.add(parent.name)
            product = products[parent.name]
            yield parent, product

    def product(self, name: str) -> Manifest:
        """The manifest of a product. Raises `RunError` if the run has no such product."""
        hidden = self.interrupted_products().get(name)
        if hidden is not None:
            raise RunError(
                f"product {name!r} of {self.folder} was being replaced and is kept as {hidden}",
                restore_hint(hidden),
            )
        if not PRODUCT_NAME.fullmatch(name) or not (self.product_folder(name) / MANIFEST).is_file():
            known = ", ".join(self.products()) or "none"
            raise RunError(f"{self.folder} has no product {name!r:.60}, it has: {known}")
        return self._manifest(name)

    def _manifest(self, name: str) -> Manifest:
        manifest = read_manifest(self.product_folder(name))
        # The name becomes a path that is read and written, so it must be the folder's.
        if manifest.name != name:
            raise RunError(
                f"{self.product_folder(name)} calls itself {manifest.name!r:.60}",
                "a product's folder has its name; rename it back",
            )
        return manifest

    def write_record(self, record: RunRecord) -> None:
        atomic_write_text(self.folder / RUN_RECORD, record.model_dump_json(indent=2) + "\n")

    def set_current(self, name: str) -> None:
        self.write_record(self.record.model_copy(update={"current": name}))

    def open_product(self, name: str) -> Checkpoint:
        """Open a product of class `HolisticVLM`. Raises `CheckpointError` for any other."""
        return open_checkpoint(self.product_folder(name))

    def open_any_product(self, name: str) -> AnyCheckpoint:
        """Open a product of any kind."""
        return open_any_checkpoint(self.product_folder(name))

    def open_teacher(self, moved_to: Path | None = None) -> Checkpoint:
        """`open_any_teacher` where students are of class `HolisticVLM`.

        Raises `RunError` for a run whose students are made in place, or if the path does not exist.
        """
        if self.teacher.in_place:
            raise RunError(f"{self.folder} {NOT_YET_IN_PLACE}", NOT_YET_HINT)
        found = self.open_any_teacher(moved_to)
        assert isinstance(found, Checkpoint)
        return found

    def open_any_teacher(self, moved_to: Path | None = None) -> AnyCheckpoint:
        """Open the teacher at its recorded path or at `moved_to`; its contents are not verified.

        Raises `RunError` if the path does not exist.
        """
        teacher = self.teacher
        path = Path(teacher.path) if moved_to is None else resolve_path(moved_to)
        if not path.exists():
            raise RunError(
                f"the teacher of {self.folder} is no longer at {path}",
                f"say where it is now with {TEACHER_OPTIONS}",
            )
        if teacher.in_place:
            return open_in_place(path)
        config = None if teacher.config is None else Path(teacher.config)
        if config is not None and not config.is_file():
            config = None
        return open_checkpoint(path, config_file=config, arch=teacher.arch)

    def verify_teacher(self, teacher: AnyCheckpoint) -> None:
        """Hash the teacher; raise `RunError` unless the run was seeded from it."""
        digests = self.teacher.digests
        strangers = sorted(set(teacher.source.names) ^ set(digests))
        if strangers or teacher.source.content_hash() != self.teacher.content_hash:
            named = f" (tensor {strangers[0]})" if strangers else ""
            raise RunError(
                f"{teacher.path} is not the teacher of {self.folder}: its tensors are not those "
                f"the run was seeded from{named}",
                f"name the right one with {TEACHER_OPTIONS}, or seed a new --run from this one",
            )

    def verify_product(self, name: str) -> None:
        """Hash a product; raise `RunError` unless the hash is that of its manifest."""
        if self.open_any_product(name).source.content_hash() != self.product(name).content_hash:
            raise RunError(
                f"product {name!r} of {self.folder} was changed since it was written",
                "make it again with --overwrite, or start from another product with --from",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other commands.

        Raises `RunError` if it is locked, or if its path is not UTF-8.
        """
        check_utf8(self.folder)
        made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                other = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                raise RunError(
                    f"{self.folder} is in use by another mmmamba command (process {other})",
                    "wait for it, or choose another --run",
                ) from error
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)
            self._remove_empty_folders(made)

    @contextmanager
    def lock_existing(self) -> Iterator[None]:
        """`lock` for an existing run. Raises `RunError` if the folder is not a run."""
        _ = self.record
        with self.lock():
            yield

    def _remove_empty_folders(self, made: list[Path]) -> None:
        """Remove the folders that this command created if they contain only the lock."""
        if not made or any(p.name != LOCK for p in self.folder.iterdir()):
            return
        (self.folder / LOCK).unlink(missing_ok=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                return
