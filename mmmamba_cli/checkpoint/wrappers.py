"""Module names that training wrappers add to a state dict: DDP, torch.compile, FSDP, checkpointing.

DDP adds `module.` in front of every name. The others add a name of their own in front of what they
wrap, which may be the model or single layers of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmmamba_cli.checkpoint.tensor_info import quoted
from mmmamba_cli.errors import CheckpointError, name_some

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
