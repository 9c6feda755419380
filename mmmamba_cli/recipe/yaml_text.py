"""Safe YAML with unique keys and the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-5` is text, `010` is eight and `no` is false. Scalars are parsed
by the core schema of YAML 1.2 instead; written text has the same meaning in both versions.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import yaml

from mmmamba_cli.errors import RecipeError

# Limit for anchors nested in anchors, which grow exponentially; recipes are far smaller.
MAX_NODES = 20_000
# Exceptions of PyYAML for a value that does not match its explicit tag.
_CONSTRUCTION_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
UNICODE_BREAKS = "\x85\u2028\u2029"

_CORE_TAGS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]{0,30}", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with `_CORE_TAGS` and checked keys; PyYAML is configured by subclassing."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        # Checked before construction, when merging (<<) adds keys to the node.
        node = super().compose_mapping_node(anchor)
        _check_keys(node)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which YAML 1.1 or 1.2 would parse as another scalar."""


def _read_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


def _read_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).replace("_", ""))


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these breaks to spaces unless they are escaped in double quotes.
    style = '"' if any(sign in text for sign in UNICODE_BREAKS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _check_keys(node: yaml.MappingNode) -> None:
    first_lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
        if key.value in first_lines:
            raise yaml.MarkedYAMLError(
                problem=f"key {key.value} stands on line {first_lines[key.value]} already",
                problem_mark=key.start_mark,
            )
        first_lines[key.value] = key.start_mark.line + 1


for _tag, _pattern, _first in _CORE_TAGS:
    _regexp = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _regexp, _first)
    _Dumper.add_implicit_resolver(_tag, _regexp, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _read_float)
_Dumper.add_representer(str, _write_text)


def read_yaml(text: str, source: str) -> Any:
    """Parse the single document in `text` into dicts, lists and scalars without shared values.

    Raises:
        RecipeError: invalid YAML, a key that is repeated or not text, an anchor that contains
            itself, or more than `MAX_NODES` values. Names `source`, and the line if there are
            several.
    """
    try:
        tree = _parse(text)
        _check_size(tree, source)
        return _copy_aliases(tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        sentence = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        sentence = f"character #x{ord(text[error.position]):04x} is not allowed"
    except RecursionError:
        raise RecipeError(f"{source}: is nested too deeply") from None
    except _CONSTRUCTION_ERRORS:
        raise RecipeError(
            f"{source}: not valid YAML: a value does not fit the tag before it, such as !!int x"
        ) from None
    where = f"{source}:{line}" if "\n" in text else source
    raise RecipeError(f"{where}: not valid YAML: {sentence}")


@lru_cache(maxsize=32)
def _parse(text: str) -> Any:
    """Parse `text`; a command reads the same recipe several times, and PyYAML is slow."""
    # `_Loader` is a SafeLoader; S506 recognises safe loaders by name only.
    return yaml.load(text, Loader=_Loader)  # noqa: S506


def _check_size(tree: Any, source: str) -> None:
    count = 0
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        count += 1
        if count > MAX_NODES:
            raise RecipeError(
                f"{source}: holds more than {MAX_NODES} values, or an anchor that contains itself"
            )
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _copy_aliases(node: Any) -> Any:
    """Copy aliases of an anchor, so that each can be changed separately."""
    if isinstance(node, dict):
        return {key: _copy_aliases(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copy_aliases(item) for item in node]
    return node


def write_yaml(tree: Any) -> str:
    """Write `tree` as YAML text, which `read_yaml` restores."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
