"""Options of generated corpora: `?long=0.33&pictures=2-56`, checked by name and range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmmamba_cli.data.generated_corpus import SAMPLES, CorpusSpec
from mmmamba_cli.errors import DataError


@dataclass(frozen=True)
class NumberOption:
    """A number from `low` to `high`."""

    default: float
    low: float = 0.0
    high: float = 1.0

    @property
    def words(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def parse(self, text: str) -> float | None:
        """The value of `text`, None if it is not allowed."""
        try:
            value = float(text)
        except ValueError:
            return None
        return value if self.low <= value <= self.high else None


@dataclass(frozen=True)
class CountOption:
    """A whole number from `low` to `high`."""

    default: int
    low: int
    high: int

    @property
    def words(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def parse(self, text: str) -> int | None:
        value = int(text) if text.isdecimal() else self.low - 1
        return value if self.low <= value <= self.high else None


@dataclass(frozen=True)
class RangeOption:
    """Two whole numbers `A-B`, both from `low` to `high`."""

    default: tuple[int, int]
    low: int
    high: int

    @property
    def words(self) -> str:
        return f"A-B, whole numbers from {self.low} to {self.high}"

    def parse(self, text: str) -> tuple[int, int] | None:
        first, dash, second = text.partition("-")
        if not (dash and first.isdecimal() and second.isdecimal()):
            return None
        low, high = int(first), int(second)
        return (low, high) if self.low <= low <= high <= self.high else None


@dataclass(frozen=True)
class FlagOption:
    """0 or 1."""

    default: bool
    words = "0 or 1"

    def parse(self, text: str) -> bool | None:
        return {"0": False, "1": True}.get(text)


@dataclass(frozen=True)
class TextOption:
    """Any text; `words` says which."""

    words: str
    default: str = ""

    def parse(self, text: str) -> str | None:
        return text or None


CorpusOption = NumberOption | CountOption | RangeOption | FlagOption | TextOption


def read_options(spec: CorpusSpec, known: Mapping[str, CorpusOption]) -> dict[str, Any]:
    """The value of every known option, given or default.

    Raises:
        DataError: an unknown option, or a value outside of its range; names what is allowed.
    """
    values: dict[str, Any] = {name: option.default for name, option in known.items()}
    for name, text in spec.options.items():
        if name not in known:
            listed = "; ".join(f"{key}: {option.words}" for key, option in known.items())
            raise DataError(
                f"{spec.text}: {spec.name}:{spec.kind} has no option {name!r}",
                f"it has {listed}; {SAMPLES}: a whole number from 1",
            )
        value = known[name].parse(text)
        if value is None:
            raise DataError(f"{spec.text}: {name} is {text!r}, expected {known[name].words}")
        values[name] = value
    return values
