"""Comparison of two checkpoints, tensor by tensor, by the names of mmmamba's layout.

Models of transformers' classes are compared by their names on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import AnyCheckpoint

Status = Literal["equal", "rounded", "changed", "other shape", "only here", "only there"]
EQUAL: Status = "equal"
ROUNDED: Status = "rounded"
CHANGED: Status = "changed"
OTHER_SHAPE: Status = "other shape"
ONLY_HERE: Status = "only here"
ONLY_THERE: Status = "only there"
# Elements compared at a time; two fp64 copies take 32 MiB.
COMPARE_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class TensorDifference:
    """Difference of one tensor: `largest` is max |a - b|, `relative` |a - b| / |b| in 2-norms.

    Both are None unless the tensor is changed or rounded; `relative` is infinite if b is 0. Tensors
    of different dtypes are equal if their values are, and rounded if casting one to the narrower
    dtype gives the other.
    """

    name: str
    status: Status
    largest: float | None = None
    relative: float | None = None
    note: str = ""


@dataclass(frozen=True)
class DifferenceGroup:
    """The same tensor in several layers with the same status, and its largest differences."""

    name: str
    status: Status
    layers: tuple[int, ...]
    tensors: int
    largest: float | None
    relative: float | None


def compare(
    here: AnyCheckpoint, there: AnyCheckpoint, advance: Callable[[int], None] | None = None
) -> list[TensorDifference]:
    """Compare every tensor of both; `advance` is called with 1 after each tensor."""
    ours, theirs = here.shapes, there.shapes
    found = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        found.append(_compare_name(here, there, name))
        if advance is not None:
            advance(1)
    return found


def _compare_name(here: AnyCheckpoint, there: AnyCheckpoint, name: str) -> TensorDifference:
    if name not in there:
        return TensorDifference(name, ONLY_HERE)
    if name not in here:
        return TensorDifference(name, ONLY_THERE)
    ours, theirs = here.shapes[name], there.shapes[name]
    if ours != theirs:
        return TensorDifference(name, OTHER_SHAPE, note=f"{list(ours)} and {list(theirs)}")
    return compare_tensors(name, here.read(name), there.read(name))


def compare_tensors(name: str, here: Tensor, there: Tensor) -> TensorDifference:
    """Compare two tensors of one shape in fp64. NaN differs from everything, including NaN."""
    narrow = min(here.dtype, there.dtype, key=lambda dtype: dtype.itemsize)
    largest = squares = norm = 0.0
    equal = rounded = True
    for a, b in zip(_chunks(here), _chunks(there), strict=True):
        wide = b.double()
        norm += float(wide.square().sum())
        gap = (a.double() - wide).abs()
        top = float(gap.max()) if gap.numel() else 0.0
        # NaN is not equal to 0 and counts as a difference.
        if top == 0:
            continue
        equal = False
        rounded = rounded and torch.equal(a.to(narrow), b.to(narrow))
        largest = top if math.isnan(top) else max(largest, top)
        squares += float(gap.square().sum())
    if equal:
        return TensorDifference(name, EQUAL)
    relative = math.sqrt(squares / norm) if norm else math.inf
    if rounded and here.dtype != there.dtype:
        return TensorDifference(name, ROUNDED, largest, relative, f"in {_dtype_name(narrow)}")
    return TensorDifference(name, CHANGED, largest, relative)


def _chunks(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.detach().reshape(-1).split(COMPARE_ELEMENTS)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def group_by_layer(differences: Iterable[TensorDifference]) -> list[DifferenceGroup]:
    """Group differences by name and status over the layers."""
    rows: dict[tuple[str, Status], list[tuple[int | None, TensorDifference]]] = {}
    for found in differences:
        words, layer = found.name.split("."), None
        if "layers" in words[:-1] and words[place := words.index("layers") + 1].isdecimal():
            layer, words[place] = int(words[place]), "*"
        rows.setdefault((".".join(words), found.status), []).append((layer, found))
    return [
        DifferenceGroup(
            name,
            status,
            tuple(layer for layer, _ in members if layer is not None),
            len(members),
            _largest(found.largest for _, found in members),
            _largest(found.relative for _, found in members),
        )
        for (name, status), members in rows.items()
    ]


def _largest(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return math.nan if any(map(math.isnan, known)) else max(known)
