"""Name tables: how a foreign checkpoint's tensors become ours, and back.

A table is a list of `Rule`s. Each ties a few foreign tensors to a few of ours by a pair of exact
inverse functions, so that one table serves both directions and every tensor is accounted for. A
table needs no torch until a tensor is read.

Module names that training wrappers add to a state dict: DDP, torch.compile, FSDP, checkpointing.

DDP adds `module.` in front of every name. The others add a name of their own in front of what they
wrap, which may be the model or single layers of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmmamba_cli.checkpoint.tensor_info import quoted
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


# No model has submodules of these names, so they are removed wherever they occur.
ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# An ordinary word: removed in front only.
LEADING = ANYWHERE | {"module"}
PEFT_PREFIX = "base_model.model."
PEFT_PARTS = frozenset({"base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
MERGE = (
    "merge the adapter into its base model first: load both with peft, call merge_and_unload() and "
    "save_pretrained(FOLDER) on the result"
)


def unwrapped_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """The model's own name of each tensor, mapped to its name in the file, in the same order.

    Raises `CheckpointError` if only some of the names carry a wrapper in front, if two names become
    one, or if the tensors are those of a peft adapter.
    """
    own: dict[str, str] = {}
    fronts: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        count = next((i for i, part in enumerate(parts) if part not in LEADING), len(parts) - 1)
        fronts.setdefault("".join(f"{part}." for part in parts[:count]), name)
        inner = ".".join(part for part in parts[count:] if part not in ANYWHERE)
        if inner in own:
            raise CheckpointError(
                f"{path}: tensors {quoted(own[inner])} and {quoted(name)} are both {quoted(inner)}",
                "save the state dict of the model inside the wrapper",
            )
        own[inner] = name
    if len(fronts) > 1:
        wrapped, plain = max(fronts), min(fronts)
        raise CheckpointError(
            f"{path} has tensors with the wrapper prefix {quoted(wrapped)}, as "
            f"{quoted(fronts[wrapped])}, and others with {quoted(plain) if plain else 'none'}, as "
            f"{quoted(fronts[plain])}",
            "save the state dict of the model inside the wrapper",
        )
    adapted = [name for inner, name in own.items() if _is_peft(inner)]
    if adapted:
        raise CheckpointError(
            f"{path} holds a peft adapter: {name_some(map(quoted, adapted), 3)}", MERGE
        )
    return own


def _is_peft(name: str) -> bool:
    return name.startswith(PEFT_PREFIX) or not PEFT_PARTS.isdisjoint(name.split("."))
