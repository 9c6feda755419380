"""Columns that the attention of each layer sees, as transformers' caches keep them."""

from __future__ import annotations

import pytest
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen3Config

from mmmamba_cli.teachers.layer_sizes import text_layer_sizes

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SLIDING = {"sliding_window": 8, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LlamaConfig(**SIZES), [None, None]),
        (MistralConfig(**SIZES, sliding_window=8), [8, 8]),
        (MistralConfig(**SIZES, sliding_window=None), [None, None]),
        (Qwen3Config(**SIZES, **SLIDING, max_window_layers=1), [None, 8]),
    ],
    ids=["llama", "mistral", "mistral without a window", "qwen3"],
)
def test_windows_are_those_of_the_cache(config: object, windows: list[int | None]) -> None:
    assert [window for _, window in text_layer_sizes(config)] == windows
    cache = DynamicCache(config=config)
    assert [getattr(layer, "sliding_window", None) for layer in cache.layers] == windows
