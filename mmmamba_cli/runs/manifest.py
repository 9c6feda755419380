"""The manifest of a product: its command, parents, layers, stages and metrics."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from mmmamba_cli import __version__
from mmmamba_cli.checkpoint.config_fields import read_json
from mmmamba_cli.errors import RunError
from mmmamba_cli.recipe import plan_kind

Model = TypeVar("Model", bound=BaseModel)

MANIFEST = "manifest.json"
FORMAT = 1


class Parent(BaseModel):
    """A checkpoint that a product was made from.

    `role` is "teacher", "student" for another product, or "origin" for an imported checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    name: str
    content_hash: str

    def __init__(self, *values: str, **fields: str) -> None:
        # Positional in code; by name from a file, where pydantic reports missing fields.
        super().__init__(**dict(zip(type(self).model_fields, values, strict=False)), **fields)


class Manifest(BaseModel):
    """The contents of `manifest.json`. `stages` are the distillation stages done, in order.

    `final`: whether the student was distilled end to end since its layers last changed; None if
    unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    name: str
    made_by: str
    created: str
    command: str
    content_hash: str
    parents: tuple[Parent, ...]
    attention_layers: tuple[int, ...]
    num_layers: int
    stages: tuple[str, ...] = ()
    final: bool | None = False
    dtype: str
    parameters: int
    recipe: str
    notes: tuple[str, ...] = ()
    metrics: dict[str, Any] = {}
    # Digests of the data of the last stage, by `train` and `held_out`.
    data: dict[str, dict[str, str]] = {}
    versions: dict[str, str] = {}
    # How the attention layers were chosen, if by measurement: method, scores file, its SHA-256.
    selection: dict[str, Any] = {}

    @model_serializer(mode="wrap")
    def _leave_out_no_selection(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Release 0.1 refuses fields that it does not know.
        fields: dict[str, Any] = dump(self)
        if not self.selection:
            fields.pop("selection", None)
        return fields

    @property
    def derived_from(self) -> Parent | None:
        """The product that this one was made from; None after a seed or an import."""
        return next((parent for parent in self.parents if parent.role == "student"), None)

    @property
    def kind(self) -> str:
        """`linear`, `hybrid (4 attention)` or `all attention`."""
        return plan_kind(len(self.attention_layers), self.num_layers)

    @property
    def progress(self) -> str:
        """A phrase for `final`: distilled end to end, not, or unknown."""
        if self.final is None:
            return "how far it was distilled is not known"
        return "distilled end to end" if self.final else "not distilled end to end"


def utc_timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def command_line() -> str:
    """The command line, quoted for a shell, with the program's name without its path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def package_versions() -> dict[str, str]:
    """Versions of packages that can change a result, and of Python."""
    found = {"mmmamba": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_manifest(folder: Path) -> Manifest:
    """Read a product's manifest. Raises `RunError` if it is missing or damaged."""
    return read_json_as(folder / MANIFEST, Manifest)


def manifest_text(manifest: Manifest) -> str:
    return json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_json_as(file: Path, kind: type[Model], formats: Collection[int] = (FORMAT,)) -> Model:
    """Parse a JSON file as `kind`. Raises `RunError` that names the file and the first problem."""
    try:
        value = read_json(file)
        if isinstance(value, Mapping) and value.get("format", FORMAT) not in formats:
            known = " and ".join(map(str, formats))
            raise RunError(
                f"{file} has format {value['format']!r}, this version knows {known}",
                "use the version of mmmamba that wrote it",
            )
        return kind.model_validate(value)
    except FileNotFoundError as error:
        raise RunError(f"{file} is not there", "check --run") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RunError(f"{file} is damaged: {place}: {first['msg'].lower()}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is not valid JSON: {error}") from error
