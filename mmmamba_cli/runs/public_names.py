"""Texts without the paths of the machine they were written on, for what is passed on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import PurePath, PureWindowsPath
from typing import Any

from mmmamba_cli.checkpoint import public_name_of
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.yaml_text import read_yaml, write_yaml

DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# An absolute path within a sentence: up to the next space or quote. Not the slashes of an address.
EMBEDDED = re.compile(r"(?<![\w:/.~\\-])(?:~?/|[A-Za-z]:\\|\.{1,2}/)[^\s'\"`,;()]*[^\s'\"`,;().:]")


def public_name(text: str) -> str:
    """A path's last part, or the repository of a folder in the Hub's cache; other text as it is."""
    known = public_name_of(text)
    if known is not None:
        return known
    option, equals, value = text.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", option):
        return f"{option}={public_name(value)}"
    if DRIVE.match(text):
        return PureWindowsPath(text).name or text
    if PurePath(text).is_absolute() or text.startswith((".", "~")):
        return PurePath(text).name or text
    return text


def public_text(text: str) -> str:
    """A sentence whose paths are shortened to their last part."""
    if "\n" not in text and _is_path(text):
        return public_name(text)
    return EMBEDDED.sub(lambda found: public_name(found[0]), text)


def public_value(value: Any, shorten: Callable[[str], str] | None = None) -> Any:
    """A copy of JSON or YAML data with `shorten` applied to every string.

    By default strings that are a path as a whole are shortened, and no others: a chat template has
    slashes of its own.
    """
    if isinstance(value, str):
        return _public_path(value) if shorten is None else shorten(value)
    if isinstance(value, dict):
        return {key: public_value(inner, shorten) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(inner, shorten) for inner in value]
    return value


def _public_path(text: str) -> str:
    return public_name(text) if "\n" not in text and _is_path(text) else text


def public_command(command: str) -> str:
    """A command whose paths are shortened, quoted as a shell reads it."""
    try:
        words = shlex.split(command)
    except ValueError:
        # Commands were once kept without quotes.
        words = command.split()
    return shlex.join(public_name(word) for word in words)


def public_recipe(text: str) -> str:
    """A recipe without the places of teacher and data, in the form in which recipes are written."""
    try:
        return write_yaml(public_value(read_yaml(text, "the recipe"), public_text))
    except (RecipeError, RecursionError):
        # Not YAML as recipes are written: as it is, its paths found by their form.
        return public_text(text)


def _is_path(text: str) -> bool:
    return bool(DRIVE.match(text)) or text.startswith(("/", "~/", "./", "../"))
