"""Random mutations of bytes and JSON trees."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Path = tuple[Any, ...]

HUGE = (2**31, 2**63 - 1, 2**64, 10**9, 10**30, 10**6)
# Values that are invalid for some field; integers are the most common mistake.
JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    *HUGE,
    1.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "3",
    "\ud800",
    "a\0b",
    "\x1b[31mred\x1b[0m\x07",
    "日本語\u202e",
    "../../../canary",
    "/etc/passwd",
    "x" * 5000,
    [],
    [1],
    [None],
    ["full_attention"] * 3,
    {},
    {"a": 1},
    {"__class__": "os.system"},
)


def deep(levels: int) -> Any:
    """A deeply nested list."""
    node: Any = []
    for _ in range(levels):
        node = [node]
    return node


def places(tree: Any, at: Path = ()) -> list[Path]:
    """Paths of all nodes of a tree, the root first."""
    found = [at]
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*at, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:20]):
            found += places(value, (*at, index))
    return found


def put(tree: Any, place: Path, value: Any) -> Any:
    """A copy of `tree` with `value` at `place`."""
    if not place:
        return value
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return tree


def get(tree: Any, place: Path) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def spoil_tree(rng: random.Random, tree: Any, done: list[str], only: Path = ()) -> Any:
    """Change one node of a copy of `tree`, within `only`; the change is described in `done`."""
    tree = copy.deepcopy(tree)
    below = [place for place in places(get(tree, only), only) if place != only] or [only]
    # Every level is equally likely; otherwise most changes would hit the longest list.
    depth = rng.choice(sorted({len(place) for place in below}))
    place = rng.choice([place for place in below if len(place) == depth])
    kind = rng.choice(("junk", "junk", "junk", "drop", "wrap", "swap", "rename", "deep"))
    parent = get(tree, place[:-1]) if place else None
    said = f"{kind} {'.'.join(map(str, place)) or 'all'}"
    if kind == "drop" and place:
        del parent[place[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        new = rng.choice(("", place[-1].upper(), f"{place[-1]} ", "\ud800", "x" * 300))
        parent[new] = parent.pop(place[-1])
    elif kind == "wrap":
        value = get(tree, place)
        tree = put(tree, place, rng.choice(([value], {"value": value}, str(value))))
    elif kind == "swap":
        tree = put(tree, place, copy.deepcopy(get(tree, rng.choice(below))))
    elif kind == "deep":
        tree = put(tree, place, deep(rng.choice((3, 200))))
    else:
        value = rng.choice(JUNK)
        said += f" = {value!r:.40}"
        tree = put(tree, place, copy.deepcopy(value))
    done.append(said)
    return tree


def spoil_json(rng: random.Random, tree: Any, done: list[str], only: Path = ()) -> bytes:
    """JSON of a mutated tree, or mutated JSON text."""
    if rng.random() < 0.85:
        for _ in range(rng.choice((1, 1, 1, 2))):
            tree = spoil_tree(rng, tree, done, only if get_or_none(tree, only) else ())
        return json.dumps(tree).encode()
    return rng.choice(TEXTS)(rng, json.dumps(tree), done)


def get_or_none(tree: Any, place: Path) -> Any:
    try:
        return get(tree, place)
    except (KeyError, IndexError, TypeError):
        return None


def _repeated(rng: random.Random, text: str, done: list[str]) -> bytes:
    key = rng.choice([part for part in text.split('"')[1::2] if part] or ["x"])
    done.append(f"key {key} twice")
    return text.replace("{", f'{{"{key}": 1, ', 1).encode()


def _nested(rng: random.Random, text: str, done: list[str]) -> bytes:
    done.append("100000 levels")
    return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000


def _other_encoding(rng: random.Random, text: str, done: list[str]) -> bytes:
    name = rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037"))
    done.append(name)
    return text.encode(name)


def _broken(rng: random.Random, text: str, done: list[str]) -> bytes:
    return spoil_bytes(rng, text.encode(), done)


def _digits(rng: random.Random, text: str, done: list[str]) -> bytes:
    done.append("a number of 5000 digits")
    return text.replace("{", '{"long": ' + "9" * 5000 + ", ", 1).encode()


def _nothing(rng: random.Random, text: str, done: list[str]) -> bytes:
    done.append("another file")
    return rng.choice(
        (b"", b"\0" * 64, b"null", b"[]", b"<!DOCTYPE html><html></html>", b"\xff\xfe")
    )


TEXTS: tuple[Callable[[random.Random, str, list[str]], bytes], ...] = (
    _repeated,
    _nested,
    _other_encoding,
    _broken,
    _digits,
    _nothing,
)


def spoil_bytes(rng: random.Random, content: bytes, done: list[str], near: int = 0) -> bytes:
    """Flip bits; set, truncate, cut, insert or repeat bytes, often within the first `near`."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(content)
        at = rng.randrange(min(near, size) if near and size and rng.random() < 0.7 else size or 1)
        length = rng.choice((1, 2, 8, 40))
        kind = rng.choice(("flip", "set", "cut off", "cut out", "put in", "repeat"))
        done.append(f"{kind} {length} at {at}")
        if kind == "flip":
            content = (
                content[:at]
                + bytes(b ^ (1 << rng.randrange(8)) for b in content[at : at + 1])
                + content[at + 1 :]
            )
        elif kind == "set":
            content = (
                content[:at]
                + bytes([rng.choice((0, 255, 127, 128))]) * length
                + content[at + length :]
            )
        elif kind == "cut off":
            content = content[:at]
        elif kind == "cut out":
            content = content[:at] + content[at + length :]
        elif kind == "put in":
            content = content[:at] + rng.randbytes(length) + content[at:]
        else:
            content = content[:at] + content[at : at + length] + content[at:]
    return content


def same_json(rng: random.Random, tree: Any, done: list[str]) -> bytes:
    """The same value with another key order, whitespace and escapes."""
    done.append("written otherwise")

    def shuffled(node: Any) -> Any:
        if isinstance(node, dict):
            keys = list(node)
            rng.shuffle(keys)
            return {key: shuffled(node[key]) for key in keys}
        return [shuffled(item) for item in node] if isinstance(node, list) else node

    indent = rng.choice((None, 1, "\t"))
    text = json.dumps(shuffled(tree), indent=indent, ensure_ascii=rng.random() < 0.5)
    return f"{' ' * rng.randrange(3)}{text}\n{' ' * rng.randrange(3)}".encode()
