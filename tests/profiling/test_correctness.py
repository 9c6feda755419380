"""Wrong caches of small models, planted: the gate finds them in every dtype."""

from __future__ import annotations

import pytest
import torch
from small import small_model
from torch import Tensor

from mmmamba_cli.profiling import WrongDecoder
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.eager_decoder import EagerDecoder
from mmmamba_cli.profiling.interfaces import GROWING, STATIC


class OffByOne(EagerDecoder):
    """Reads its last prompt token's keys and values over the first's place."""

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        logits = super().prefill(ids, chunk)
        assert self.cache is not None
        for layer in self.cache.layers:
            layer.keys[:, :, 0] = layer.keys[:, :, ids.shape[1] - 1]
        return logits


class Forgetful(EagerDecoder):
    """Loses the SSM state of one layer between prefill and the next token."""

    def prefill(self, ids: Tensor, chunk: int | None = None) -> Tensor:
        logits = super().prefill(ids, chunk)
        assert self.cache is not None
        self.cache.layers[2].recurrent_states[0].zero_()
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("plan", "wrong"), [("aaaa", OffByOne), ("mmmm", Forgetful), ("amma", Forgetful)]
)
def test_the_gate_catches_a_planted_wrong_cache(
    plan: str, wrong: type[EagerDecoder], dtype: torch.dtype
) -> None:
    model = small_model(plan).to(dtype)
    checked = check_decoder("right", EagerDecoder(model, STATIC))
    assert {"as measured", "growing cache"} <= set(checked.distances)
    with pytest.raises(WrongDecoder, match=r"wrong, as measured(, in fp32)?: logits are"):
        check_decoder("wrong", wrong(model, STATIC))


def test_the_gate_looks_at_the_other_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("aaaa")
    monkeypatch.setattr(
        EagerDecoder, "variants", lambda self: {"growing cache": OffByOne(self.model, GROWING)}
    )
    with pytest.raises(WrongDecoder, match="static, growing cache: logits are"):
        check_decoder("static", EagerDecoder(model, STATIC))
