"""Caches: second turns with images, crop, row selection, static caches, assisted decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import IMAGE_ID, distance, join_pixels, pad_batch, small_model
from small import prompt as fp32_prompt
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.model import HybridCache, new_cache

CLOSE = 1e-10
SHUFFLES = ["pre", "post"]
PLANS = ["aaaa", "mmmm", "amam", "maam"]
MORE = torch.tensor([[5, 17, 33]])


def model_of(plan: str, shuffle: str = "pre", **options: Any) -> Any:
    return small_model(plan, shuffle, **options).double()


def prompt(tiles: int, text: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    ids, pixels = fp32_prompt(tiles, text, seed)
    return ids, None if pixels is None else pixels.double()


def filled(model: Any, *parts: tuple[Tensor, Tensor | None], cache: Any = None) -> Any:
    """A cache filled with these parts in turn."""
    cache = new_cache(model.config) if cache is None else cache
    for ids, pixels in parts:
        model(ids, pixels, past_key_values=cache)
    return cache


def whole(*parts: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return torch.cat([ids for ids, _ in parts], 1), join_pixels([pixels for _, pixels in parts])


class TestSecondTurn:
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("room", [None, 60])
    @pytest.mark.parametrize("first", [(0, 5), (2, 5)])
    def test_images_on_a_filled_cache_equal_the_full_forward(
        self, shuffle: str, plan: str, room: int | None, first: tuple[int, int]
    ) -> None:
        """Includes a static cache, whose embedding layers are widened while they hold keys."""
        model = model_of(plan, shuffle)
        parts = [prompt(*first), prompt(0, 4, 1), prompt(1, 6, 2), (MORE, None), prompt(2, 3, 3)]
        full = model(*whole(*parts)).logits
        for given_again in (False, True):
            cache, found = new_cache(model.config, room), []
            for i, (ids, pixels) in enumerate(parts):
                if given_again:
                    pixels = join_pixels([p for _, p in parts[: i + 1]])
                found.append(model(ids, pixels, past_key_values=cache).logits)
            assert distance(torch.cat(found, 1), full) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("second", [[(1, 9), (2, 5)], [(2, 6), (0, 4)]])
    def test_rows_of_different_length(
        self, shuffle: str, plan: str, second: list[tuple[int, int]]
    ) -> None:
        """Rows are left-padded in the first turn, and between the turns in the second."""
        model = model_of(plan, shuffle)
        turns = [
            [prompt(1, 5, 0), prompt(2, 9, 1)],
            [prompt(*row, seed=2 + i) for i, row in enumerate(second)],
        ]
        (ids, mask), (ids_2, mask_2) = (pad_batch([row for row, _ in turn]) for turn in turns)
        seen = torch.cat((mask, mask_2), 1)
        own = join_pixels([pixels for _, pixels in turns[1]])
        conversations = [whole(*turn) for turn in zip(*turns, strict=True)]
        everything = join_pixels([pixels for _, pixels in conversations])
        for pixels in (own, everything):
            cache = new_cache(model.config)
            model(ids, join_pixels([p for _, p in turns[0]]), mask, past_key_values=cache)
            found = model(ids_2, pixels, seen, past_key_values=cache).logits
            step = model(
                MORE[:, :1].repeat(2, 1),
                attention_mask=torch.cat((seen, seen.new_ones(2, 1)), 1),
                past_key_values=cache,
            ).logits
            for i, (row, row_pixels) in enumerate(conversations):
                longer = torch.cat((row, MORE[:, :1]), 1)
                alone = model(longer, row_pixels).logits[0]
                length = turns[1][i][0].shape[1]
                assert distance(found[i][mask_2[i].bool()], alone[-length - 1 : -1]) < CLOSE
                assert distance(step[i], alone[-1:]) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("plan", ["aaaa", "amam"])
    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}]
    )
    @pytest.mark.parametrize("given_again", [False, True])
    @pytest.mark.parametrize("only_new", [False, True])
    def test_generate(
        self, shuffle: str, plan: str, options: dict[str, int], given_again: bool, only_new: bool
    ) -> None:
        model = model_of(plan, shuffle)
        parts = [prompt(1, 7, 0), prompt(2, 5, 1)]
        ids, pixels = whole(*parts)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, **options}
        wanted = model.generate(ids, pixel_values=pixels, **options)
        cache = filled(model, parts[0])
        given = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
        given["pixel_values"] = pixels if given_again else parts[1][1]
        found = model.generate(parts[1][0] if only_new else ids, **given, **options)
        assert torch.equal(found[:, -6:], wanted[:, -6:])

    @pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
    def test_beam_search_with_images_after_a_text_turn(self, device: str) -> None:
        model = model_of("amam").to(device)
        parts = [prompt(0, 7, 0), prompt(1, 5, 1)]
        ids, pixels = (x.to(device) for x in whole(*parts) if x is not None)
        beams = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 2}
        wanted = model.generate(ids, pixel_values=pixels, **beams)
        cache = filled(model, (parts[0][0].to(device), None))
        found = model.generate(ids, pixel_values=pixels, past_key_values=cache, **beams)
        assert torch.equal(found[:, -6:], wanted[:, -6:])

    def test_earlier_images_may_be_passed_in_a_turn_without_images(self) -> None:
        model = model_of("amam")
        parts = [prompt(1, 7, 0), prompt(0, 5, 1)]
        ids, pixels = whole(*parts)
        wanted = model.generate(ids, pixel_values=pixels, max_new_tokens=6)
        cache = filled(model, parts[0])
        found = model.generate(ids, pixel_values=pixels, past_key_values=cache, max_new_tokens=6)
        assert torch.equal(found, wanted)

    def test_wrong_numbers_of_tiles_are_refused(self) -> None:
        model = model_of("amam")
        first, second = prompt(2, 7, 0), prompt(1, 5, 1)
        pixels = torch.cat((first[1], second[1]))  # type: ignore[arg-type]
        sentence = "2 tiles, but the new columns need 1 and the columns in the cache hold 2"
        with pytest.raises(DataError, match=sentence):
            model(second[0], pixels[:2], past_key_values=filled(model, first))
        with pytest.raises(DataError, match=sentence):
            model.generate(
                whole(first, second)[0],
                pixel_values=pixels[:2],
                past_key_values=filled(model, first),
                num_beams=2,
            )
        with pytest.raises(DataError, match="no pixel_values were given"):
            model(second[0], past_key_values=filled(model, first))
        with pytest.raises(DataError, match="no pixel_values were given"):
            model(second[0], pixels[:0])

    def test_rows_of_another_batch_are_refused(self) -> None:
        model = model_of("amam")
        with pytest.raises(DataError, match="3 rows, but the cache holds 1"):
            model(MORE.repeat(3, 1), past_key_values=filled(model, prompt(0, 4)))


class TestCrop:
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("kept", [7, 4, 3, 1, 0, -1])
    def test_continuing_after_a_crop_equals_the_full_forward(self, shuffle: str, kept: int) -> None:
        """Keep `kept` columns of the second part; -1 is the end of the first."""
        model = model_of("aaaa", shuffle)
        first, second = prompt(1, 6, 0), (prompt(0, 8, 1))
        taken = first[0].shape[1] + max(kept, -1)
        ids, pixels = whole(first, second)
        wanted = model(torch.cat((ids[:, :taken], MORE), 1), pixels).logits[:, taken:]
        for count in (taken - ids.shape[1], taken):
            cache = filled(model, first, second)
            cache.crop(count)
            assert cache.get_seq_length() == taken
            found = model(MORE, past_key_values=cache).logits
            assert distance(found, wanted) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_crop_an_image_and_continue_with_another(self, shuffle: str) -> None:
        model = model_of("aaaa", shuffle)
        first, second, third = prompt(1, 6, 0), prompt(2, 5, 1), prompt(1, 4, 2)
        before = first[0].shape[1] + 2
        kept = (torch.cat((first[0], second[0][:, :2]), 1), first[1])
        full = model(*whole(kept, third)).logits
        for room in (None, DynamicCache(config=model.config)):
            cache = filled(model, first, second, cache=room)
            if room is None:
                cache.crop(-(second[0].shape[1] - 2))
            else:
                cache = HybridCache(room)
                cache.crop(before)
            found = model(third[0], third[1], past_key_values=cache).logits
            assert distance(found, full[:, before:]) < CLOSE
            assert cache.decoding_state.count_row_tiles().tolist() == [2]

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_padded_rows_with_images(self, shuffle: str) -> None:
        model = model_of("aaaa", shuffle)
        inputs = [prompt(2, 6, 0), prompt(0, 5, 1), prompt(1, 9, 2)]
        ids, mask = pad_batch([row for row, _ in inputs])
        pixels = join_pixels([p for _, p in inputs])
        cache = new_cache(model.config)
        model(ids, pixels, mask, past_key_values=cache)
        cache.crop(-2)
        longer = torch.cat((mask[:, :-2], mask.new_ones(3, 3)), 1)
        found = model(MORE.repeat(3, 1), attention_mask=longer, past_key_values=cache).logits
        for i, (row, row_pixels) in enumerate(inputs):
            alone = model(torch.cat((row[:, :-2], MORE), 1), row_pixels).logits
            assert distance(found[i], alone[0, -3:]) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_crop_within_an_image_is_refused_and_changes_nothing(self, shuffle: str) -> None:
        model = model_of("aaaa", shuffle)
        given = prompt(2, 6)
        full = model(*whole(given, (MORE, None))).logits
        cache = filled(model, given)
        for columns in (3, 5, 7, 9):
            with pytest.raises(DataError, match="ends within an image"):
                cache.crop(columns)
        found = model(MORE, past_key_values=cache).logits
        assert distance(found, full[:, -3:]) < CLOSE

    def test_crop_of_images_of_different_sizes_is_refused_with_post(self) -> None:
        model = model_of("aaaa", "post")
        ids, pixels = prompt(1, 9, 0)
        moved = torch.cat((ids[:, 6:12], ids[:, 2:6], ids[:, 12:], ids[:, :2]), 1)
        both = torch.cat([pixels, pixels])  # type: ignore[list-item]
        cache = new_cache(model.config)
        model(torch.cat((ids, moved)), both, past_key_values=cache)
        with pytest.raises(DataError, match="different sizes before that"):
            cache.crop(6)
        cache.crop(2)
        assert cache.decoding_state.embedding.length == 2

    def test_crop_of_more_than_the_length(self) -> None:
        model = model_of("aaaa")
        cache = filled(model, prompt(0, 5))
        cache.crop(9)
        cache.crop(0)
        assert cache.get_seq_length() == 5
        with pytest.raises(DataError, match="holds 5 columns, 6 cannot be removed"):
            cache.crop(-6)
        cache.crop(-5)
        again, pixels = prompt(1, 4, 3)
        assert (
            distance(
                model(again, pixels, past_key_values=cache).logits, model(again, pixels).logits
            )
            < CLOSE
        )

    @pytest.mark.parametrize("plan", ["mmmm", "amam"])
    def test_recurrent_layers_are_refused(self, plan: str) -> None:
        model = model_of(plan)
        cache = filled(model, prompt(0, 5))
        with pytest.raises(MmmambaError, match="recurrent state holds only its last column"):
            cache.crop(-1)
        assert not cache.is_croppable
        cache.crop(0)
        assert cache.get_seq_length() == 5

    def test_position_ids_are_required_again_after_a_crop(self) -> None:
        model = model_of("aaaa")
        ids, _ = prompt(0, 8)
        at = 7 + torch.arange(11)[None]
        full = model(torch.cat((ids[:, :6], MORE), 1), position_ids=at[:, :9]).logits
        cache = new_cache(model.config)
        model(ids, position_ids=at[:, :8], past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(DataError, match="filled with position_ids and cropped since"):
            model(MORE, past_key_values=cache)
        found = model(MORE, position_ids=at[:, 6:9], past_key_values=cache).logits
        assert distance(found, full[:, 6:]) < CLOSE

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_static_memory(self, shuffle: str) -> None:
        model = model_of("aaaa", shuffle)
        first, second, third = prompt(1, 6, 0), prompt(2, 5, 1), prompt(1, 4, 2)
        before = first[0].shape[1] - 1
        full = model(*whole((first[0][:, :-1], first[1]), third)).logits
        cache = filled(model, first, second, cache=new_cache(model.config, 24))
        cache.crop(before)
        found = model(*third, past_key_values=cache).logits
        assert distance(found, full[:, before:]) < CLOSE

    def test_crop_of_other_layer_classes_is_refused(self) -> None:
        """For example quantized layers, which hold only a part of the keys to crop."""

        class Packed(DynamicLayer):
            pass

        model = model_of("aaaa")
        cache = new_cache(model.config)
        cache.layers[2] = Packed()
        filled(model, prompt(0, 5), cache=cache)
        assert not cache.is_croppable
        with pytest.raises(MmmambaError, match="a cache of Packed cannot be cropped"):
            cache.crop(-1)

    @pytest.mark.parametrize("shuffle", SHUFFLES)
    def test_layers_cropped_directly_are_followed_or_refused(self, shuffle: str) -> None:
        """A `DynamicCache` does not update the decoding state."""
        model = model_of("aaaa", shuffle)
        first = prompt(1, 6)
        taken = first[0].shape[1] - 2
        wanted = model(torch.cat((first[0][:, :taken], MORE), 1), first[1]).logits[:, taken:]
        cache = filled(model, first, cache=DynamicCache(config=model.config))
        cache.crop(-2)
        assert distance(model(MORE, past_key_values=cache).logits, wanted) < CLOSE
        cache.layers[0].keys = cache.layers[0].keys[:, :, :-1]
        with pytest.raises(DataError, match="passed through the model with it"):
            model(MORE, past_key_values=cache)
        foreign = DynamicCache(config=model.config)
        for layer in range(4):
            foreign.update(*torch.randn(2, 1, 2, 3, 8).double().unbind(), layer)
        with pytest.raises(DataError, match="hold 3 columns, but 0 passed"):
            model(MORE, past_key_values=foreign)


def _crop(cache: Any) -> None:
    cache.crop(-1)


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


class TestStatic:
    @pytest.mark.parametrize("plan", ["aaaa", "amam", "maam"])
    def test_exceeding_the_capacity_is_refused(self, plan: str) -> None:
        model = model_of(plan, "post")
        cache = filled(model, prompt(1, 5), cache=new_cache(model.config, 11))
        with pytest.raises(DataError, match="room for 11 columns, but 9 are taken and 3 more"):
            model(MORE, past_key_values=cache)

    @pytest.mark.parametrize("plan", PLANS)
    def test_a_plain_static_cache(self, plan: str) -> None:
        model = model_of(plan, "post")
        parts = [prompt(0, 5), prompt(2, 4, 1), (MORE, None)]
        full = model(*whole(*parts)).logits
        cache = StaticCache(config=model.config, max_cache_len=30)
        found = [model(*part, past_key_values=cache).logits for part in parts]
        assert distance(torch.cat(found, 1), full) < CLOSE

    def test_a_cache_that_creates_its_layers(self) -> None:
        model = model_of("aaaa", "post")
        parts = [prompt(1, 5), prompt(1, 4, 1)]
        full = model(*whole(*parts)).logits
        cache = DynamicCache()
        found = [model(*part, past_key_values=cache).logits for part in parts]
        assert distance(torch.cat(found, 1), full) < CLOSE


class TestBadSizes:
    @pytest.mark.parametrize("chunk", [0, -3])
    def test_prefill_chunk_size(self, chunk: int) -> None:
        model = model_of("amam")
        ids, pixels = prompt(1, 5)
        with pytest.raises(DataError, match=f"prefill_chunk_size is {chunk}, expected at least 1"):
            model(ids, pixels, prefill_chunk_size=chunk)
        with pytest.raises(DataError, match=f"prefill_chunk_size is {chunk}, expected at least 1"):
            model.generate(ids, pixel_values=pixels, prefill_chunk_size=chunk, max_new_tokens=2)

    @pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
    def test_empty_prompts(self, shape: tuple[int, int]) -> None:
        model = model_of("amam")
        ids = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(DataError, match="expected at least one row and one column"):
            model(ids)
        with pytest.raises(DataError, match="expected at least one row and one column"):
            model(ids, prefill_chunk_size=4)
        with pytest.raises(DataError, match="expected at least one row and one column"):
            model(ids, past_key_values=filled(model, prompt(0, 4)))


class TestDrafts:
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("tiles", [0, 1])
    def test_assisted_decoding_gives_the_greedy_tokens(self, shuffle: str, tiles: int) -> None:
        model = model_of("aaaa", shuffle)
        ids, pixels = prompt(tiles, 12)
        ids = torch.cat((ids, ids[:, -8:]), 1)
        given = {"pixel_values": pixels, "max_new_tokens": 16, "min_new_tokens": 16}
        greedy = model.generate(ids, **given)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **given), greedy)
        for seed in (0, 1):
            drafts = model_of("aaaa", shuffle, seed=seed)
            found = model.generate(ids, assistant_model=drafts, **given)
            assert torch.equal(found, greedy)

    @pytest.mark.parametrize("plan", ["mmmm", "amam"])
    def test_recurrent_models_are_stateful(self, plan: str) -> None:
        model, drafts = model_of("aaaa"), model_of(plan)
        assert not model._is_stateful
        assert drafts._is_stateful
        ids, _ = prompt(0, 9)
        with pytest.raises(ValueError, match="stateful"):
            drafts.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4)
        with pytest.raises(MmmambaError, match="recurrent state"):
            model.generate(ids, assistant_model=drafts, max_new_tokens=4)


def test_image_tokens_are_not_drafted_into_the_answer() -> None:
    model = model_of("aaaa")
    ids, pixels = prompt(1, 6)
    found = model.generate(ids, pixel_values=pixels, prompt_lookup_num_tokens=3, max_new_tokens=9)
    assert IMAGE_ID not in found[0, ids.shape[1] :]
