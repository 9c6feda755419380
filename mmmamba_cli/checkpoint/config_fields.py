"""Validated fields of a `config.json`; errors name the field.

`section` is the config or a section of it, `name` the section's name ("" for the whole config), and
`where` the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmmamba_cli.errors import CheckpointError

Section = Mapping[str, Any]

# Upper bounds: a larger value would cost time or memory before the missing tensors are noticed.
MAX_INT = 1 << 31
MAX_LAYERS = 10_000

# RoPE scaling types the model supports, and the numbers each needs.
ROPE_SCALINGS = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def read_json(file: Path) -> Any:
    """Parse a JSON file, with or without a byte order mark.

    Raises `OSError`, and `ValueError` or `RecursionError` for what is not JSON. Lone surrogates
    (`\\ud800`) are rejected: they cannot be encoded as UTF-8.
    """
    value = json.loads(file.read_text(encoding="utf-8-sig"))
    json.dumps(value, ensure_ascii=False).encode()
    return value


def field_path(where: str, name: str, key: str) -> str:
    """`config.json: llm_config.hidden_size`."""
    return f"{where}: {name}.{key}" if name else f"{where}: {key}"


def positive_int(section: Section, key: str, where: str, name: str = "") -> int:
    """A positive integer. Raises `CheckpointError`."""
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_INT:
        raise CheckpointError(
            f"{field_path(where, name, key)} is {value!r:.60}, expected a whole number above zero"
        )
    return value


def positive_float(
    section: Section, key: str, default: float | None, where: str, name: str = ""
) -> float:
    """A positive number; required if `default` is None. Raises `CheckpointError`."""
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{field_path(where, name, key)} is {value!r:.60}, expected a number above zero"
        )
    return float(value)


def token_ids(section: Section, key: str, where: str, name: str = "") -> int | list[int] | None:
    """A token id, a list of ids (several end-of-text tokens), or None. Raises `CheckpointError`."""
    value = section.get(key)
    listed = value if isinstance(value, list) else [value]
    if value is not None and not all(type(one) is int and 0 <= one < MAX_INT for one in listed):
        raise CheckpointError(
            f"{field_path(where, name, key)} is {value!r:.60}, expected the id of a token"
        )
    return value


def require_value(section: Section, key: str, value: Any, where: str, name: str = "") -> None:
    """Raise `CheckpointError` unless the option is absent or equals `value`, the only supported."""
    if section.get(key, value) != value:
        raise CheckpointError(
            f"{field_path(where, name, key)} is {section[key]!r:.60}, only {value!r} is supported"
        )


def stack_fields(section: Section, where: str, name: str = "") -> dict[str, Any]:
    """Fields of a `StackConfig` from a Llama-style config, without biases and norms."""
    hidden = positive_int(section, "hidden_size", where, name)
    heads = positive_int(section, "num_attention_heads", where, name)
    kv_heads, head_dim = heads, hidden // heads
    if section.get("num_key_value_heads") is not None:
        kv_heads = positive_int(section, "num_key_value_heads", where, name)
    explicit = section.get("head_dim") is not None
    if explicit:
        head_dim = positive_int(section, "head_dim", where, name)
    if (hidden % heads and not explicit) or heads % kv_heads or head_dim % 2:
        subject = f"{name} has " if name else ""
        raise CheckpointError(
            f"{where}: {subject}hidden_size {hidden}, num_attention_heads {heads} and "
            f"num_key_value_heads {kv_heads}, expected each to divide the one before, and an even "
            f"head size, which is {head_dim}"
        )
    layers = positive_int(section, "num_hidden_layers", where, name)
    if layers > MAX_LAYERS:
        raise CheckpointError(
            f"{field_path(where, name, 'num_hidden_layers')} is {layers}, expected at most "
            f"{MAX_LAYERS}"
        )
    maximum = positive_int(
        {"max_position_embeddings": 2048, **section}, "max_position_embeddings", where, name
    )
    return {
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": positive_int(section, "intermediate_size", where, name),
        "rms_norm_eps": positive_float(section, "rms_norm_eps", 1e-5, where, name),
        "max_position_embeddings": maximum,
        **_rope(section, maximum, where, name),
    }


def check_rope_scaling(scaling: Any, where: str) -> None:
    """Validate native RoPE scaling: None, or a type with the numbers it needs."""
    if scaling is None:
        return
    kind = scaling.get("type") if isinstance(scaling, dict) else None
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        known = ", ".join(map(repr, ROPE_SCALINGS))
        raise CheckpointError(
            f"{field_path(where, '', 'rope_scaling')} is {scaling!r:.60}, expected null or a table "
            f"with one of the types {known}"
        )
    for key in ROPE_SCALINGS[kind]:
        positive_float(scaling, key, None, where, "rope_scaling")


def _rope(section: Section, maximum: int, where: str, name: str) -> dict[str, Any]:
    """RoPE base and scaling from `rope_theta` and `rope_scaling`, or from `rope_parameters`."""
    scaling, together = section.get("rope_scaling"), section.get("rope_parameters")
    key = "rope_scaling" if together is None else "rope_parameters"
    if together is not None and not isinstance(together, dict):
        raise CheckpointError(
            f"{field_path(where, name, key)} is {together!r:.60}, expected a table"
        )
    if scaling is not None and not isinstance(scaling, dict):
        raise CheckpointError(
            f"{field_path(where, name, 'rope_scaling')} is {scaling!r:.60}, expected a table"
        )
    inside = f"{name}.{key}".lstrip(".")
    both = {**(together or {}), **(scaling or {})}
    require_value(section, "partial_rotary_factor", 1.0, where, name)
    require_value(both, "partial_rotary_factor", 1.0, where, inside)
    bases = {"rope_theta": section.get("rope_theta", 10000.0), **both}
    theta = positive_float(bases, "rope_theta", None, where, name)
    kind = both.get("type", both.get("rope_type", "default" if scaling is None else None))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
        known = ", ".join(map(repr, ROPE_SCALINGS))
        raise CheckpointError(
            f"{field_path(where, name, key)} is of type {kind!r:.60}, known are {known}",
            "the model's positions cannot be computed as it was trained",
        )
    values = {"original_max_position_embeddings": maximum, **both}
    found = {k: positive_float(values, k, None, where, inside) for k in ROPE_SCALINGS[kind]}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **found}}
