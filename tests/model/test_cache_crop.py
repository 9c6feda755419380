"""`crop` of a cache: continuing equals the full forward; what cannot be cropped is refused."""

from __future__ import annotations

import pytest
import torch
from cache_cases import CLOSE, MORE, SHUFFLES, filled, model_of, prompt, whole
from small import distance, join_pixels, pad_batch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.model import HybridCache, new_cache


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
