"""Error messages of recipe validation: location, value, allowed values.

Allowed values are read from the schema's annotations, so that messages match the checks.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Location = tuple[str | int, ...]

MAX_SHOWN_CHARACTERS = 60
# Attributes of pydantic's constraints, lower bounds first.
BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


@dataclass(frozen=True)
class Allowed:
    """Allowed values in words, as metadata of a field with a custom validator."""

    words: str


@dataclass(frozen=True)
class Problem:
    """A problem and its location in the recipe."""

    location: Location
    sentence: str

    def line(self, source: str) -> str:
        """`source: section.field: sentence`; without field for a problem of the whole recipe."""
        parts = (source, format_location(self.location), self.sentence)
        return ": ".join(part for part in parts if part)


def format_location(location: Location) -> str:
    """`("stages", 1, "lr")` as `stages[1].lr`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def format_value(value: Any) -> str:
    """A value in YAML notation, truncated to `MAX_SHOWN_CHARACTERS`."""
    if isinstance(value, str):
        # Quoted, to distinguish the text '1e-3' from the number.
        text = f"'{value}'"
    elif value is None or isinstance(value, bool | int | float):
        text = json.dumps(value)
    elif isinstance(value, dict):
        text = "a section" if value else "an empty section"
    elif isinstance(value, list | tuple):
        shown = ", ".join(format_value(item) for item in value[:10])
        text = f"[{shown}{', ...' if value[10:] else ''}]"
    else:
        text = str(value)
    text = text.replace("\n", " ")
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."


def join_or(names: Sequence[str]) -> str:
    """`a, b or c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def suggest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` if a name is close, else an empty string."""
    close = get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """All problems that pydantic found in the input of `model`, without duplicates."""
    found = [_problem(details, model) for details in error.errors(include_url=False)]
    # pydantic also reports a list as too short if all its entries are invalid.
    beneath = {p.location[:depth] for p in found for depth in range(len(p.location))}
    return [p for p in dict.fromkeys(found) if p.location not in beneath]


def _problem(details: Any, model: type[BaseModel]) -> Problem:
    location: Location = tuple(details["loc"])
    if details["type"] == "recipe":
        return Problem((*location, *details["ctx"]["within"]), details["ctx"]["sentence"])
    if details["type"] == "extra_forbidden":
        names = list(_section_at(model, location[:-1]).model_fields)
        key = str(location[-1])
        sentence = f"unknown key, allowed are {', '.join(names)}{suggest(key, names)}"
        return Problem(location, sentence)
    annotation, metadata = _field_at(model, location)
    words = describe_allowed(annotation, metadata)
    if details["type"] == "missing":
        return Problem(location, f"is missing, must be {words}")
    value = details["input"]
    choices = _choices(annotation)
    hint = suggest(value, choices) if isinstance(value, str) else ""
    return Problem(location, f"is {format_value(value)}, must be {words}{hint}")


def _field_at(model: type[BaseModel], location: Location) -> tuple[Any, list[Any]]:
    """Annotation and constraints of the value at a location."""
    annotation: Any = model
    metadata: list[Any] = []
    for part in location:
        annotation, metadata = _unwrap(annotation, metadata)
        if isinstance(part, int):
            items = get_args(annotation)
            annotation = items[0] if items[-1] is Ellipsis else items[part]
            metadata = []
        elif get_origin(annotation) is dict:
            annotation, metadata = get_args(annotation)[1], []
        else:
            info = annotation.model_fields[part]
            annotation, metadata = info.annotation, list(info.metadata)
    return annotation, metadata


def _section_at(model: type[BaseModel], location: Location) -> Any:
    section, _ = _unwrap(*_field_at(model, location))
    return section


def _unwrap(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """Strip `Annotated` and `| None`, and collect the constraints."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            for item in extra:
                metadata = [*metadata, *(item.metadata if isinstance(item, FieldInfo) else [item])]
        elif _nullable(annotation):
            (annotation,) = (a for a in get_args(annotation) if a is not types.NoneType)
        else:
            return annotation, metadata


def _nullable(annotation: Any) -> bool:
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return is_union and types.NoneType in get_args(annotation)


def _choices(annotation: Any) -> list[str]:
    bare, _ = _unwrap(annotation, [])
    return [str(choice) for choice in get_args(bare)] if get_origin(bare) is Literal else []


def describe_allowed(annotation: Any, metadata: list[Any]) -> str:
    """Allowed values in words, for example `a whole number from 1 to 16 or null`."""
    bare, constraints = _unwrap(annotation, metadata)
    null = " or null" if _nullable(annotation) else ""
    for item in constraints:
        if isinstance(item, Allowed):
            return item.words
    if get_origin(bare) is Literal:
        return f"one of {', '.join(_choices(bare))}{null}"
    if bare is bool:
        return f"true or false{null}"
    if bare in (int, float):
        kind = "a whole number" if bare is int else "a number"
        return f"{kind}{_bounds(constraints)}{null}"
    if bare is str:
        some = "some " if _not_empty(constraints) else ""
        return f"{some}text{null}"
    if get_origin(bare) is tuple:
        items = get_args(bare)
        if items[-1] is not Ellipsis:
            return f"a list of {len(items)}, each {describe_allowed(items[0], [])}{null}"
        some = ", not empty" if _not_empty(constraints) else ""
        return f"a list{some}, each {describe_allowed(items[0], [])}{null}"
    if get_origin(bare) is dict:
        return f"a section, each value {describe_allowed(get_args(bare)[1], [])}{null}"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return f"a section with the keys {', '.join(bare.model_fields)}{null}"
    raise TypeError(f"no words for what {bare} allows")


def _bounds(constraints: list[Any]) -> str:
    parts = [
        f"{words} {getattr(item, bound)}"
        for bound, words in BOUNDS
        for item in constraints
        if hasattr(item, bound)
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _not_empty(constraints: list[Any]) -> bool:
    return any(hasattr(item, "min_length") for item in constraints)
