"""Versions of other packages: required, tested, and known incompatibilities.

Versions are read from the metadata of installed distributions, without importing them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from mmmamba_cli.errors import MmmambaError, MmmambaWarning

# A test compares these with pyproject.toml.
REQUIREMENTS = {
    "torch": ">=2.9",
    "transformers": ">=5.17,<6",
    "safetensors": ">=0.5",
    "sentencepiece": ">=0.2",
    "protobuf": "",
    "numpy": "",
    "inflect": ">=7.2",
    "pillow": ">=10",
    "pydantic": ">=2.7",
    "pyyaml": ">=6",
    "typer": ">=0.15",
    "rich": ">=13",
}
# Newest release that the test suite ran on, for packages with frequent breaking changes.
NEWEST_TESTED = {"transformers": (5, 24)}
# In the error of a torchvision whose compiled operators were not loaded.
TORCHVISION_OPERATORS = "torchvision::"
TORCHVISION_REMEDY = (
    "install torchvision again, from the index that torch came from, or pip uninstall torchvision"
)


@dataclass(frozen=True)
class KnownIncompatibility:
    """Packages that do not work together, each within its bounds (`satisfies`).

    One of `requires_any` must also be installed, in any version. With `capability`, a GPU of that
    major compute capability must be present, which only `mmmamba doctor` checks. `is_fatal` stops
    the import of the model; otherwise `mmmamba doctor` warns. `problem` may contain the version of
    a package in braces.
    """

    name: str
    packages: Mapping[str, str]
    problem: str
    remedy: str
    requires_any: tuple[str, ...] = ()
    capability: int | None = None
    is_fatal: bool = False

    def applies(self, versions: Mapping[str, str]) -> bool:
        """Whether the installed `versions` are incompatible."""
        within = all(
            name in versions and satisfies(versions[name], bounds)
            for name, bounds in self.packages.items()
        )
        return within and (
            not self.requires_any or any(name in versions for name in self.requires_any)
        )

    def sentence(self, versions: Mapping[str, str]) -> str:
        return self.problem.format_map(versions)


HOPPER = 9
KNOWN_INCOMPATIBILITIES = (
    # flash-linear-attention itself refuses its gated backward there, which was silently wrong.
    KnownIncompatibility(
        "flash-linear-attention",
        {"triton": ">=3.4,<3.7.1"},
        "refuses its gated backward on Hopper with Triton {triton}, where it was wrong",
        "train with the plain backend, or with Triton newer than 3.7.0",
        requires_any=("fla-core", "flash-linear-attention"),
        capability=HOPPER,
    ),
)


def installed_version(name: str) -> str | None:
    """Version of a distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def release_numbers(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: (2, 13, 0) of `2.13.0+cpu`."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def satisfies(text: str, needs: str) -> bool:
    """Whether a version satisfies `needs`: bounds with >= and <, separated by commas."""
    bounds = re.findall(r"(>=|<)([\d.]+)", needs)
    return all(
        (release_numbers(text) >= release_numbers(b)) == (sign == ">=") for sign, b in bounds
    )


def is_untested(name: str, text: str) -> bool:
    """Whether a version is newer than `NEWEST_TESTED`."""
    newest = NEWEST_TESTED.get(name)
    return newest is not None and release_numbers(text)[: len(newest)] > newest


def version_problems(versions: Mapping[str, str]) -> Iterator[MmmambaError]:
    """Errors for installed `versions` that the model cannot run with."""
    found = versions.get("transformers")
    if found is not None and not satisfies(found, REQUIREMENTS["transformers"]):
        needs = REQUIREMENTS["transformers"]
        yield MmmambaError(
            f"transformers {found} is installed, mmmamba needs {needs}",
            f"pip install 'transformers{needs}'",
        )
    for pair in KNOWN_INCOMPATIBILITIES:
        if pair.is_fatal and pair.applies(versions):
            yield MmmambaError(f"{pair.name}: {pair.sentence(versions)}", pair.remedy)


def torchvision_problem(error: BaseException | None) -> str | None:
    """How torchvision differs from torch, if `error` or its cause is one of its missing operators.

    transformers imports torchvision wherever it is installed, for pictures.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if TORCHVISION_OPERATORS in str(error):
            first = str(error).strip().splitlines()[0]
            return (
                f"{installed_version('torchvision')} does not match torch "
                f"{installed_version('torch')}: {first:.200}"
            )
        error = error.__cause__ or error.__context__
    return None


@cache
def require_versions() -> None:
    """Raise `MmmambaError` for unusable versions; warn once about untested ones."""
    names = {"transformers", *(name for pair in KNOWN_INCOMPATIBILITIES for name in pair.packages)}
    names |= {name for pair in KNOWN_INCOMPATIBILITIES for name in pair.requires_any}
    versions = {name: text for name in names if (text := installed_version(name)) is not None}
    for problem in version_problems(versions):
        raise problem
    found = versions.get("transformers")
    if found is not None and is_untested("transformers", found):
        newest = ".".join(map(str, NEWEST_TESTED["transformers"]))
        warnings.warn(
            MmmambaWarning(
                f"transformers {found} is newer than {newest}, the newest that this release of "
                f"mmmamba was tested with (pip install transformers~={newest}.0 if something fails)"
            ),
            stacklevel=2,
        )
