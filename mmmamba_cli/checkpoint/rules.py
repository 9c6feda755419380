"""Name tables: how a foreign checkpoint's tensors become ours, and back.

A table is a list of `Rule`s. Each ties a few foreign tensors to a few of ours by a pair of exact
inverse functions, so that one table serves both directions and every tensor is accounted for. A
table needs no torch until a tensor is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmmamba_cli.errors import CheckpointError, name_some

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Tensors = tuple["Tensor", ...]


@dataclass(frozen=True)
class Rule:
    """`to_ours` maps the foreign tensors to ours, in order; `to_foreign` is its exact inverse.

    `foreign` gives the shape each foreign tensor must have.
    """

    foreign: Mapping[str, Shape]
    ours: Mapping[str, Shape]
    to_ours: Callable[..., Tensors]
    to_foreign: Callable[..., Tensors]


def rename(foreign: str, ours: str, shape: Shape) -> Rule:
    """The same tensor under another name."""
    return Rule({foreign: shape}, {ours: shape}, _same, _same)


def _same(*tensors: Tensor) -> Tensors:
    return tensors


def packed_qkv(
    foreign: str, ours: Sequence[str], num_heads: int, num_kv_heads: int, head_dim: int, hidden: int
) -> Rule:
    """Rows packed per key/value head as [q x H/K, k, v] blocks of P rows, against q, k and v.

    Foreign (K (H/K + 2) P, D); ours q (H P, D), k (K P, D), v (K P, D). Splitting makes views.
    """
    group = num_heads // num_kv_heads

    def split(wqkv: Tensor) -> Tensors:
        blocks = wqkv.view(num_kv_heads, group + 2, head_dim, hidden)
        q, k, v = blocks[:, :group], blocks[:, group], blocks[:, group + 1]
        return q.reshape(-1, hidden), k.reshape(-1, hidden), v.reshape(-1, hidden)

    def fuse(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        import torch

        q = q.view(num_kv_heads, group, head_dim, hidden)
        k = k.view(num_kv_heads, 1, head_dim, hidden)
        v = v.view(num_kv_heads, 1, head_dim, hidden)
        return (torch.cat((q, k, v), dim=1).reshape(-1, hidden),)

    wide, narrow = num_heads * head_dim, num_kv_heads * head_dim
    shapes = ((wide, hidden), (narrow, hidden), (narrow, hidden))
    return Rule(
        {foreign: (wide + 2 * narrow, hidden)}, dict(zip(ours, shapes, strict=True)), split, fuse
    )


def stacked_rows(foreign: Mapping[str, Shape], ours: str) -> Rule:
    """Several foreign tables stacked by rows into one of ours."""
    sizes = [shape[0] for shape in foreign.values()]
    width = next(iter(foreign.values()))[1:]

    def stack(*tables: Tensor) -> Tensors:
        import torch

        return (tables[0],) if len(tables) == 1 else (torch.cat(tables),)

    def cut(table: Tensor) -> Tensors:
        return tuple(table.split(sizes))

    return Rule(dict(foreign), {ours: (sum(sizes), *width)}, stack, cut)


def foreign_tensors(
    rules: Sequence[Rule], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The table's other direction: foreign names and tensors, from ours as `read` gives them."""
    for rule in rules:
        yield from zip(rule.foreign, rule.to_foreign(*map(read, rule.ours)), strict=True)


def check_names(
    rules: Sequence[Rule], shapes: Mapping[str, Shape], where: str, what: str = "checkpoint"
) -> None:
    """Compare the tensors at hand with those the table asks for.

    Raises `CheckpointError` that names missing, unexpected and misshaped tensors, ten of each.
    """
    wanted = {name: shape for rule in rules for name, shape in rule.foreign.items()}
    compare_tensors(wanted, shapes, f"{where} is not a complete {what}")


def compare_tensors(wanted: Mapping[str, Shape], shapes: Mapping[str, Shape], title: str) -> None:
    """Raise `CheckpointError` unless the names and shapes are just those wanted."""
    problems = []
    missing = [name for name in wanted if name not in shapes]
    if missing:
        problems.append(f"missing {len(missing)} tensors: {name_some(missing)}")
    extra = [name for name in shapes if name not in wanted]
    if extra:
        problems.append(f"{len(extra)} unexpected tensors: {name_some(extra)}")
    misshaped = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if misshaped:
        problems.append(f"{len(misshaped)} of another shape: {name_some(misshaped)}")
    if problems:
        raise CheckpointError(
            f"{title}: {'; '.join(problems)}",
            "check that the file belongs to its config and was downloaded completely",
        )
