"""Caches: second turns with images, static caches, bad sizes, assisted decoding."""

from __future__ import annotations

import pytest
import torch
from cache_cases import CLOSE, MORE, PLANS, SHUFFLES, filled, model_of, prompt, whole
from small import IMAGE_ID, distance, join_pixels, pad_batch
from transformers import DynamicCache, StaticCache

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.model import new_cache


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
