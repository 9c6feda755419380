"""The correctness check accepts right decoders and rejects wrong ones, in every dtype."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small import small_model
from stand_ins import Bench, StandIn, subject_of
from torch import Tensor

from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.profiling import Plan, WrongDecoder, profile
from mmmamba_cli.profiling.correctness import check_decoder
from mmmamba_cli.profiling.eager_decoder import EagerDecoder
from mmmamba_cli.profiling.interfaces import GROWING, STATIC


class OffByOne(EagerDecoder):
    """Writes the keys of the last prompt token over those of the first."""

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


class Rounding(StandIn):
    """Its bf16 logits are at a relative distance `rounding` from those of `wide`.

    `wide` None simulates that there is no memory for an fp32 copy. An error e in each of 16 logits,
    one of which is 1, is a relative distance of 4 e.
    """

    rounding = 0.0
    wide: StandIn | None = None

    def forward_without_cache(self, ids: torch.Tensor, last: int) -> torch.Tensor:
        return super().forward_without_cache(ids, last).bfloat16() * (1 + self.rounding)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        return super()._logits(ids) * (1 + self.rounding)

    def in_fp32(self) -> StandIn:
        return super().in_fp32() if self.wide is None else self.wide


def test_right_decoders_pass_and_wrong_ones_do_not() -> None:
    bench = Bench()
    assert check_decoder("right", StandIn("right", bench)).distances == {"as measured": 0.0}
    with pytest.raises(WrongDecoder, match="wrong, as measured: logits are"):
        check_decoder("wrong", StandIn("wrong", bench, error=0.01))
    behind = StandIn("front", bench, others={"graph": StandIn("graph", bench, error=0.01)})
    with pytest.raises(WrongDecoder, match="front, graph: logits are"):
        check_decoder("front", behind)
    with pytest.raises(WrongDecoder, match="logits are nan"):
        check_decoder("nan", StandIn("nan", bench, error=float("nan")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("plan", "wrong"), [("aaaa", OffByOne), ("mmmm", Forgetful), ("amma", Forgetful)]
)
def test_a_wrong_cache_is_found(plan: str, wrong: type[EagerDecoder], dtype: torch.dtype) -> None:
    model = small_model(plan).to(dtype)
    checked = check_decoder("right", EagerDecoder(model, STATIC))
    assert {"as measured", "growing cache"} <= set(checked.distances)
    with pytest.raises(WrongDecoder, match=r"wrong, as measured(, in fp32)?: logits are"):
        check_decoder("wrong", wrong(model, STATIC))


def test_the_other_cache_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("aaaa")
    monkeypatch.setattr(
        EagerDecoder, "variants", lambda self: {"growing cache": OffByOne(self.model, GROWING)}
    )
    with pytest.raises(WrongDecoder, match="static, growing cache: logits are"):
        check_decoder("static", EagerDecoder(model, STATIC))


@pytest.mark.parametrize(
    ("rounding", "allowed"), [(0.0, 0.05), (0.02, 0.05), (0.04, 0.08), (None, 0.05)]
)
def test_16_bits_are_allowed_twice_the_rounding_of_the_reference(rounding, allowed) -> None:
    bench = Bench()
    right, wrong = (Rounding("one", bench, error=share * allowed / 4) for share in (0.9, 1.1))
    for one in (right, wrong):
        one.wide = None if rounding is None else StandIn("one", bench)
        one.rounding = rounding or 0.0
    checked = check_decoder("one", right)
    # `rounding` is itself rounded to bf16.
    assert checked.tolerance == pytest.approx(allowed, rel=0.1)
    assert ("as measured, in fp32" in checked.distances) == (rounding is not None)
    with pytest.raises(WrongDecoder, match="one, as measured: logits are") as error:
        check_decoder("one", wrong)
    assert error.value.tolerance == checked.tolerance


def test_a_fault_hidden_by_16_bits_is_found_in_fp32() -> None:
    bench = Bench()
    one = Rounding("one", bench)
    one.wide = StandIn("one", bench, error=0.001)
    with pytest.raises(WrongDecoder, match=r"one, as measured, in fp32: logits are 0\.004"):
        check_decoder("one", one)


@pytest.mark.parametrize(("error", "passes"), [(0.00018, True), (0.00022, False)])
def test_fp32_is_allowed_a_thousandth_of_the_16_bit_rounding(error: float, passes: bool) -> None:
    bench = Bench()
    one = Rounding("one", bench)
    one.rounding = 0.1
    one.wide = StandIn("one", bench, error=error / 4)
    if passes:
        assert check_decoder("one", one).distances["as measured, in fp32"] > 0.0001
    else:
        with pytest.raises(WrongDecoder, match="in fp32: logits are"):
            check_decoder("one", one)


def test_logits_that_are_not_finite_are_an_error_of_the_checkpoint() -> None:
    class Senseless(StandIn):
        def forward_without_cache(self, ids: torch.Tensor, last: int) -> torch.Tensor:
            return super().forward_without_cache(ids, last) * float("inf")

    with pytest.raises(CheckpointError, match="mine gives logits that are not finite"):
        check_decoder("mine", Senseless("mine", Bench()))


def test_fp32_copy_of_a_wrong_decoder_is_freed_before_measuring() -> None:
    alive: list[bool] = []

    class Watched(Rounding):
        def in_fp32(self) -> StandIn:
            copy = StandIn("copy", self.bench, error=0.01)
            self.copy = weakref.ref(copy)
            return copy

        def fill_random(self, batch: int, columns: int, rng: torch.Generator) -> None:
            gc.collect()
            alive.append(self.copy() is not None)
            super().fill_random(batch, columns, rng)

    subject = subject_of(Watched("one", Bench()))
    plan = Plan(contexts=(10,), repeats=1, rounds=1, prefill=False, roofline=False)
    found = profile([subject], plan, timer=Bench(), on_wrong="measure")
    assert list(found.gate.wrong) == ["one"]
    assert alive
    assert not any(alive)
