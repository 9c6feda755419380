"""Writes reference.md: every command with its options, every field of a recipe, from the code.

    python docs/make_reference.py

A command of the pipeline, or one that an entry point of this project adds, is listed without a
line here; commands of other packages that happen to be installed are not.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmmamba_cli.cli.app import COMMANDS, PLUGINS, build_app
from mmmamba_cli.recipe import Recipe, load_recipe, recipe_names
from mmmamba_cli.recipe.problems import describe_allowed, format_value

PAGE = Path(__file__).resolve().parent / "reference.md"
COMMAND = "python docs/make_reference.py"
HEAD = f"""# Reference

<!-- Written by `{COMMAND}`; change the code's own help instead. -->

Every command has `--help`. Exit codes: 0 done, 2 a mistake in what was given, 1 a bug of ours,
130 interrupted. Results go to stdout, progress and warnings to stderr. With `--json` a mistake is
on stdout too, as `{{"error": "...", "hint": "..."}}`, `hint` being null where there is none.
Letters that the encoding of stdout lacks are escaped, in JSON as JSON escapes them.

| environment variable | is |
|---|---|
| `MMMAMBA_RUN` | the run directory, where `--run` is not given |
| `LMUData` | the folder of evaluation tables, where `--data` is not given |
| `XDG_CACHE_HOME` | where tables that are drawn, not downloaded, are kept; else `~/.cache` |
"""
FIELDS_HEAD = """\
Any of them by `--set FIELD=VALUE`. `stages` is a list; a stage is named by its `name` or counted
from 0, as in `stages.stage3.lr` and `stages[2].lr`.
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    parts += [_command(f"mmmamba {name}", one) for name, one in commands()]
    parts.append("## Shipped recipes\n\n" + _recipes())
    parts.append("## Fields of a recipe\n\n" + FIELDS_HEAD)
    parts += [_section(path, model) for path, model in _sections("", Recipe)]
    return "\n".join(parts)


def commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of this project's commands, those of groups behind their group's name."""
    app: Any = typer.main.get_command(build_app())
    project = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    added = project["project"]["entry-points"].get(PLUGINS, {})
    for name in (*COMMANDS, *sorted(set(added) - set(COMMANDS))):
        yield from _leaves(name, app.commands[name])


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for inner, one in below.items():
        yield from _leaves(f"{name} {inner}", one)


def _command(title: str, command: Any) -> str:
    given = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([title, *(["[OPTIONS]"] if options else []), *map(argument_word, given)])
    lines = [f"## {title}", "", f"`{usage}`", "", inspect.cleandoc(command.help or ""), ""]
    if given:
        arguments = [(f"`{argument_word(p)}`", p.help) for p in given]
        lines += [*_table(("argument", "is"), arguments), ""]
    if options:
        rows = [(f"`{_option_word(p)}`", _default(p), p.help) for p in options]
        lines += [*_table(("option", "default", "is"), rows), ""]
    return "\n".join(lines)


def argument_word(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _option_word(parameter: Any) -> str:
    names = "/".join((*parameter.opts, *parameter.secondary_opts))
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or parameter.opts[0].rpartition('-')[2].upper()}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, bool):
        return f"`{parameter.opts[0]}`" if value else ""
    return f"`{value}`" if isinstance(value, str | int | float | PurePath) else ""


def _recipes() -> str:
    loaded = [(name, load_recipe(name)) for name in recipe_names()]
    rows = [
        (f"`{name}`", one.description, format_value(one.layers.attention)) for name, one in loaded
    ]
    heading = ("recipe", "is", "attention layers")
    said = "`mmmamba recipe show NAME` prints one in full."
    return "\n".join([*_table(heading, rows), "", said, ""])


def _sections(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted path, model) of a recipe's sections, the outermost first."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is not None:
            place = f"{name}[]" if get_args(field.annotation)[1:] == (Ellipsis,) else name
            yield from _sections(f"{path}.{place}".lstrip("."), inner)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_of, get_args(annotation))), None)


def _section(path: str, model: type[BaseModel]) -> str:
    rows = [
        (
            f"`{name}`",
            _field_default(field),
            describe_allowed(field.annotation, field.metadata),
            words,
        )
        for name, field in model.model_fields.items()
        if _model_of(field.annotation) is None
        for words in [field.description]
    ]
    doc = inspect.cleandoc(model.__doc__ or "")
    title = f"### `{path}`" if path else "### At the top"
    return "\n".join([title, "", doc, "", *_table(("field", "default", "may be", "is"), rows), ""])


def _field_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    return f"`{format_value(list(value) if isinstance(value, tuple) else value)}`"


def _table(heading: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    lines = [heading, ("---",) * len(heading), *rows]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in lines]


def cell(value: Any) -> str:
    """One line of Markdown that ends no cell; without HTML, which `<image>` would be taken for."""
    words = " ".join(str(value or "").split())
    return words.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
