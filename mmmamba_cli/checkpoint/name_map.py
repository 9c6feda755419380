"""Name maps: tensors of a foreign checkpoint to native tensors and back.

A name map is a list of `TensorMapping`s. Each maps a few foreign tensors to a few native ones by a
pair of exact inverse functions, so that one map serves both directions and every tensor is
accounted for. torch is imported only when a tensor is read.

`unwrapped_names` removes the module names that training wrappers (DDP, torch.compile, FSDP,
activation checkpointing) add to a state dict.
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

# Wrappers around the model or single layers. No model has such submodules: removed everywhere.
WRAPPER_MODULES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# DDP's `module` is an ordinary word: removed at the start only.
LEADING_MODULES = WRAPPER_MODULES | {"module"}
PEFT_PREFIX = "base_model.model."
PEFT_PARTS = frozenset({"base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
MERGE_HINT = (
    "merge the adapter into its base model first: load both with peft, call merge_and_unload() and "
    "save_pretrained(FOLDER) on the result"
)


@dataclass(frozen=True)
class TensorMapping:
    """Foreign and native names with their shapes, and the conversion of tensors both ways.

    `to_native` takes the foreign tensors in order and returns the native ones; `to_foreign` is its
    exact inverse.
    """

    foreign: Mapping[str, Shape]
    native: Mapping[str, Shape]
    to_native: Callable[..., Tensors]
    to_foreign: Callable[..., Tensors]


def rename(foreign: str, native: str, shape: Shape) -> TensorMapping:
    """Map one tensor to another name, unchanged."""
    return TensorMapping({foreign: shape}, {native: shape}, _same, _same)


def _same(*tensors: Tensor) -> Tensors:
    return tensors


def packed_qkv(
    foreign: str,
    native: Sequence[str],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    hidden: int,
) -> TensorMapping:
    """Map InternLM2's packed wqkv, [q x H/K, k, v] blocks of P rows per key/value head, to q, k, v.

    Foreign (K (H/K + 2) P, D); native q (H P, D), k (K P, D), v (K P, D). Splitting makes views.
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
    return TensorMapping(
        {foreign: (wide + 2 * narrow, hidden)}, dict(zip(native, shapes, strict=True)), split, fuse
    )


def stacked_rows(foreign: Mapping[str, Shape], native: str) -> TensorMapping:
    """Map several foreign tables to one native table, concatenated along rows."""
    sizes = [shape[0] for shape in foreign.values()]
    width = next(iter(foreign.values()))[1:]

    def stack(*tables: Tensor) -> Tensors:
        import torch

        return (tables[0],) if len(tables) == 1 else (torch.cat(tables),)

    def cut(table: Tensor) -> Tensors:
        return tuple(table.split(sizes))

    return TensorMapping(dict(foreign), {native: (sum(sizes), *width)}, stack, cut)


def foreign_tensors(
    name_map: Sequence[TensorMapping], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield foreign names and tensors, converted from the native tensors that `read` returns."""
    for mapping in name_map:
        yield from zip(mapping.foreign, mapping.to_foreign(*map(read, mapping.native)), strict=True)


def check_names(
    name_map: Sequence[TensorMapping],
    shapes: Mapping[str, Shape],
    where: str,
    what: str = "checkpoint",
) -> None:
    """Compare the tensors of a checkpoint, by name and shape, with the foreign side of the map.

    Raises `CheckpointError` that names missing, unexpected and misshaped tensors, ten of each.
    """
    wanted = {name: shape for mapping in name_map for name, shape in mapping.foreign.items()}
    compare_tensors(wanted, shapes, f"{where} is not a complete {what}")


def compare_tensors(wanted: Mapping[str, Shape], shapes: Mapping[str, Shape], title: str) -> None:
    """Raise `CheckpointError` unless names and shapes are exactly those of `wanted`."""
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


def unwrapped_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Map each tensor's name without wrappers to its name in the file, in the same order.

    Raises `CheckpointError` if only some names have a wrapper prefix, if two names become equal, or
    if the tensors are those of a peft adapter.
    """
    own: dict[str, str] = {}
    fronts: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        count = next(
            (i for i, part in enumerate(parts) if part not in LEADING_MODULES), len(parts) - 1
        )
        fronts.setdefault("".join(f"{part}." for part in parts[:count]), name)
        inner = ".".join(part for part in parts[count:] if part not in WRAPPER_MODULES)
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
            f"{path} holds a peft adapter: {name_some(map(quoted, adapted), 3)}", MERGE_HINT
        )
    return own


def _is_peft(name: str) -> bool:
    return name.startswith(PEFT_PREFIX) or not PEFT_PARTS.isdisjoint(name.split("."))
