"""Sizes of the layers of a text decoder, as mixers and caches need them."""

from __future__ import annotations

from typing import Any

from mmmamba_cli.architecture import StackConfig
from mmmamba_cli.teachers.anatomy import anatomy_of, attention_stack
from mmmamba_cli.teachers.refusals import text_config


def text_layer_sizes(config: Any) -> list[tuple[StackConfig, int | None]]:
    """The sizes of each layer, and the columns that its attention sees; None for all.

    Args:
        config: a teacher's or a student's.

    Raises:
        MmmambaError: a teacher that cannot be converted.
    """
    text = text_config(config)
    # Without types, as in Mistral, the window is that of every layer: transformers' caches too.
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    found = []
    for layer, view in enumerate(anatomy_of(config).attention):
        slides = not kinds or (layer < len(kinds) and kinds[layer] == "sliding_attention")
        found.append((attention_stack(view, text), int(window) if slides and window else None))
    return found
