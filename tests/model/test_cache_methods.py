"""The methods of transformers' `Cache`: row selection, reset, recording, and what they report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_cases import CLOSE, MORE, PLANS, SHUFFLES, filled, model_of, prompt, whole
from small import distance, join_pixels, pad_batch
from transformers import Cache, DynamicCache

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HybridCache, new_cache


def _rows(cache: Any) -> None:
    cache.batch_select_indices(torch.tensor([False, True, True]))


# Public methods of `Cache`: "reads" do not change the cache, "layers" are called by the mixers,
# "changes" are tested below by name.
METHODS = {
    "batch_repeat_interleave": "changes",
    "batch_select_indices": "changes",
    "reorder_cache": "changes",
    "crop": "changes",
    "reset": "changes",
    "activate_past_recording": "changes",
    "early_initialization": "layers",
    "update": "layers",
    "update_conv_state": "layers",
    "update_recurrent_state": "layers",
    "update_indexer": "layers",
    "offload": "layers",
    "prefetch": "layers",
    "get_seq_length": "reads",
    "get_query_offset": "reads",
    "get_max_length": "reads",
    "get_max_cache_shape": "reads",
    "max_cache_len": "reads",
    "max_batch_size": "reads",
    "batch_size": "reads",
    "get_mask_sizes": "reads",
    "get_conv_state": "reads",
    "get_recurrent_state": "reads",
    "has_previous_state": "reads",
    "is_compileable": "reads",
    "is_croppable": "reads",
    "is_dummy": "reads",
    "is_initialized": "reads",
    "is_linear": "reads",
    "is_recording_past": "reads",
    "is_sliding": "reads",
}


class TestMethodsOfCache:
    def test_every_method_is_listed(self) -> None:
        """A newer transformers may add a method that changes layers without the decoding state."""
        public = {name for name in dir(Cache) if not name.startswith("_")}
        assert public - METHODS.keys() == set()

    def test_methods_that_change_layers_are_overridden(self) -> None:
        changing = {name for name, kind in METHODS.items() if kind == "changes"}
        assert changing <= vars(HybridCache).keys()

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("room", [None, 40])
    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (_rows, [1, 2]),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
            (lambda cache: cache.early_initialization(3, 2, 8, torch.float64, "cpu"), [0, 1, 2]),
        ],
        ids=["repeat", "select", "select_bool", "reorder", "early_initialization"],
    )
    def test_rows(
        self,
        shuffle: str,
        plan: str,
        room: int | None,
        change: Callable[[Any], None],
        rows: list[int],
    ) -> None:
        """Rows with padding and images continue as each row alone, with further images."""
        model = model_of(plan, shuffle)
        inputs = [prompt(2, 6, 0), prompt(0, 5, 1), prompt(1, 9, 2)]
        ids, mask = pad_batch([row for row, _ in inputs])
        cache = new_cache(model.config, room)
        model(ids, join_pixels([p for _, p in inputs]), mask, past_key_values=cache)
        change(cache)
        assert cache.rows == len(rows)
        new, new_pixels = prompt(1, 3, 7)
        assert new_pixels is not None
        chosen = [inputs[i] for i in rows]
        pixels = join_pixels([p for _, row in chosen for p in (row, new_pixels)])
        seen = torch.cat((mask[rows], mask.new_ones(len(rows), new.shape[1])), 1)
        found = model(new.repeat(len(rows), 1), pixels, seen, past_key_values=cache).logits
        for i, (row, row_pixels) in enumerate(chosen):
            alone = model(*whole((row, row_pixels), (new, new_pixels))).logits[0, row.shape[1] :]
            assert distance(found[i], alone) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("room", [None, 20])
    def test_reset_equals_a_new_cache(self, shuffle: str, plan: str, room: int | None) -> None:
        model = model_of(plan, shuffle)
        cache = new_cache(model.config, room)
        for seed in range(3):
            given = prompt(2, 6, seed)
            found = model(*given, past_key_values=cache).logits
            assert distance(found, model(*given).logits) < CLOSE
            widest = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
            assert widest <= 20 + 3 * 8
            cache.reset()
            assert cache.get_seq_length() == 0

    @pytest.mark.parametrize("plan", PLANS)
    def test_rows_with_one_row_of_positions(self, plan: str) -> None:
        model = model_of(plan)
        ids = torch.cat([prompt(0, 6, seed)[0] for seed in range(3)])
        at = 7 + torch.arange(9)[None]
        cache = new_cache(model.config)
        model(ids, position_ids=at[:, :6], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0]))
        found = model(MORE.repeat(2, 1), position_ids=at[:, 6:], past_key_values=cache).logits
        whole_ids = torch.cat((ids[[2, 0]], MORE.repeat(2, 1)), 1)
        assert distance(found, model(whole_ids, position_ids=at).logits[:, 6:]) < CLOSE

    @pytest.mark.parametrize("plan", PLANS)
    def test_recording_the_past(self, plan: str) -> None:
        model = model_of(plan)
        cache = filled(model, prompt(0, 5))
        if plan != "aaaa":
            with pytest.raises(MmmambaError, match="recurrent state"):
                cache.activate_past_recording()
            inner = DynamicCache(config=model.config)
            inner.activate_past_recording()
            with pytest.raises(MmmambaError, match="recurrent state"):
                model(MORE, past_key_values=inner)
            return
        cache.activate_past_recording()
        wanted = model(torch.cat((prompt(0, 5)[0], MORE), 1)).logits[:, 5:]
        assert distance(model(MORE, past_key_values=cache).logits, wanted) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("room", [None, 20])
    def test_reading_methods_report_the_language_stack(
        self, shuffle: str, plan: str, room: int | None
    ) -> None:
        model = model_of(plan, shuffle)
        cache = filled(model, prompt(1, 6), cache=new_cache(model.config, room))
        static = room is not None and "a" in plan
        assert cache.get_seq_length() == cache.get_query_offset() == 10
        assert cache.get_mask_sizes(2, 3) == (room if static else 12, 0)
        assert cache.get_max_length() == (room if static else -1)
        assert cache.is_compileable is False
        assert cache.is_croppable is (plan == "aaaa")
        assert copy.deepcopy(cache).get_seq_length() == 10
