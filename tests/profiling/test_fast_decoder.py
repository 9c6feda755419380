"""The fast decoder passes the correctness check and decodes greedily from a random cache."""

from __future__ import annotations

import pytest
import torch
from small import small_model
from torch import Tensor

from mmmamba_cli.errors import DataError
from mmmamba_cli.profiling import WrongDecoder
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.fast_decoder import FastDecoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_passes_the_check_at_every_length(plan: str, dtype: torch.dtype) -> None:
    decoder = FastDecoder(small_model(plan).to(dtype))
    checked = check_decoder("one", decoder, lengths=(40, 300))
    in_fp32 = ["as measured, in fp32"] if dtype == torch.bfloat16 else []
    assert list(checked.distances) == [
        *in_fp32,
        "as measured",
        "as measured, after 40 tokens",
        "as measured, after 300 tokens",
    ]
    assert decoder.cache_bytes == 0


def test_fp32_copy_does_not_change_the_model() -> None:
    model = small_model("am").bfloat16()
    decoder = FastDecoder(model)
    ids = decoder.random_prompt(2, 9, torch.Generator().manual_seed(0))
    before = decoder.forward_without_cache(ids, 3)
    found = decoder.in_fp32().forward_without_cache(ids, 3)
    wanted = small_model("am").bfloat16().float()(ids).logits[:, -3:]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
    assert decoder.dtype == torch.bfloat16
    assert torch.equal(decoder.forward_without_cache(ids, 3), before)


class Forgetful(FastDecoder):
    """Clears its cache after prompts longer than 100 columns."""

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        logits = super().prefill(ids, chunk)
        if ids.shape[1] > 100:
            sequence = self.generator._sequence
            assert sequence is not None
            for tensor in sequence.cache.tensors:
                tensor.zero_()
        return logits


@pytest.mark.parametrize("plan", ["aaaa", "mmmm"])
def test_a_fault_in_long_prompts_only_is_found(plan: str) -> None:
    decoder = Forgetful(small_model(plan))
    check_decoder("one", decoder, lengths=(40,))
    with pytest.raises(WrongDecoder, match="one, as measured, after 300 tokens: logits are"):
        check_decoder("one", decoder, lengths=(40, 300))


@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
def test_decoding_continues_from_a_random_cache(plan: str) -> None:
    """Capacity, columns and batch size are kept; the contents are random."""
    decoder = FastDecoder(small_model(plan))
    rng = torch.Generator().manual_seed(0)
    decoder.start(3, 40)
    decoder.fill_random(3, 30, rng)
    sequence = decoder.generator._sequence
    assert sequence is not None
    assert sequence.length == 30
    last = decoder.decode(10)
    assert last.shape == (3, 1)
    # No row ends early: EOS is off.
    assert sequence.length == 40
    assert not sequence.cache.finished.any()
    assert decoder.cache_bytes > 0
    if "a" in plan:
        with pytest.raises(DataError, match="room for 40 columns"):
            decoder.decode(1)
    decoder.release()
    assert decoder.cache_bytes == 0


def test_tokens_are_greedy() -> None:
    """Step by step and by the graph, from the same random cache."""
    decoder = FastDecoder(small_model("amam"))
    rng = torch.Generator().manual_seed(0)
    decoder.start(2, 40)
    decoder.fill_random(2, 30, rng)
    chosen = torch.cat([decoder.decode(1).clone() for _ in range(4)], dim=1)
    decoder.start(2, 40)
    decoder.fill_random(2, 30, rng)
    cache = decoder.generator._sequence.cache  # type: ignore[union-attr]
    suppressed = decoder.model.generation_config.suppress_tokens
    for column in range(4):
        decoder.generator._sequence.step()  # type: ignore[union-attr]
        logits = cache.logits.clone()
        logits[:, suppressed] = float("-inf")
        assert torch.equal(logits.argmax(-1), cache.ids)
        assert torch.equal(cache.ids, chosen[:, column])
