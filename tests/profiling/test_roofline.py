"""The roofline: bytes and operations of a token, and predictions from it."""

from __future__ import annotations

import pytest
import torch
from small import VOCABULARY, small_model
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.inference import quantize
from mmmamba_cli.profiling import Plan, measure, profile
from mmmamba_cli.profiling.interfaces import Cost
from mmmamba_cli.profiling.report import tables
from mmmamba_cli.profiling.result import RooflinePart
from mmmamba_cli.profiling.roofline import (
    count_weights,
    measure_roofline,
    minimum_cost,
    roofline_seconds,
)
from mmmamba_cli.profiling.timers import CPUTimer

RATES = RooflinePart(copy_rate=1000.0, matmul_rate=10.0, size=1, side=1)
# 4 heads of 8, 2 key/value heads, hidden size 32, 48 within the MLP.
MLP, HEAD = 3 * 48 * 32, VOCABULARY * 32
ATTENTION_LAYER = 32 * 32 * 2 + 16 * 32 * 2 + MLP
SCAN_LAYER = 32 * 32 * 3 + 16 * 32 * 2 + 4 * 32 + MLP


def test_a_decode_step_reads_weights_keys_and_states() -> None:
    model = small_model("amam").to(torch.bfloat16)
    weights = count_weights(model)
    matrices = 2 * (ATTENTION_LAYER + SCAN_LAYER)
    assert (weights.block_elements, weights.head_elements) == (matrices, HEAD)
    # Vectors and fp32 parameters add little; the token table and vision weights are left out.
    assert 2 * matrices < weights.block_bytes < 2.2 * matrices
    assert weights.head_bytes == 2 * HEAD

    def cost(batch: int, context: int) -> Cost:
        return minimum_cost(model.config, weights, torch.bfloat16, batch, context, False)

    # All parameters except vision weights and the token table.
    vision = sum(p.nbytes for p in model.model.vision.parameters())
    table = model.model.text_embedding.weight.nbytes
    assert weights.bytes == sum(p.nbytes for p in model.parameters()) - vision - table
    one = cost(1, 0)
    # Two states, 4 x 8 x 8 in fp32, are read and written.
    assert one.bytes - weights.bytes == 2 * 2 * 4 * 8 * 8 * 4
    assert one.operations == 2 * (matrices + HEAD) + 2 * 4 * 4 * 8 * 8
    # Of 100 columns, keys and values of two layers with two heads; 4 heads multiply them.
    assert cost(1, 100).bytes - one.bytes == 2 * 2 * 100 * 2 * 8 * 2
    assert cost(1, 100).operations - one.operations == 2 * 4 * 100 * 4 * 8
    more = cost(3, 100)
    assert more.bytes - weights.bytes == 3 * (cost(1, 100).bytes - weights.bytes)
    assert more.operations == 3 * cost(1, 100).operations


def test_a_window_reads_no_more_columns_than_there_are() -> None:
    model = small_model("wwww", window=8, sinks=2)
    weights = count_weights(model)

    def cached(context: int, prefill: bool = False) -> int:
        cost = minimum_cost(model.config, weights, torch.float32, 1, context, prefill)
        return cost.bytes - weights.bytes

    # Keys and values of two heads of 8 in fp32, in four layers.
    column = 4 * 2 * 2 * 8 * 4
    assert [cached(n) for n in (0, 3, 10, 100)] == [0, 3 * column, 10 * column, 10 * column]
    assert cached(3, prefill=True) == 3 * column


def test_prefill_counts_causal_scores_and_one_row_of_logits() -> None:
    model = small_model("aa")
    weights = count_weights(model)
    prompt = minimum_cost(model.config, weights, torch.float32, 1, 10, True)
    scores = 2 * 2 * 2 * 55 * 4 * 8
    assert prompt.operations == 2 * (10 * 2 * ATTENTION_LAYER + HEAD) + scores
    linear = small_model("mm")
    ours = minimum_cost(linear.config, count_weights(linear), torch.float32, 1, 10, True)
    # A prompt writes its keys and values once, of 10 columns.
    assert prompt.bytes == weights.bytes + 2 * 2 * 10 * 2 * 8 * 4
    assert minimum_cost(
        model.config, weights, torch.float32, 3, 10, True
    ).bytes - weights.bytes == 3 * (prompt.bytes - weights.bytes)
    state = 4 * 8 * 8
    assert ours.operations == 2 * (10 * 2 * SCAN_LAYER + HEAD) + 2 * 10 * 4 * state
    assert ours.bytes == count_weights(linear).bytes + 2 * state * 4


def test_int8_weights_count_one_byte_each() -> None:
    model = small_model("mm")
    wide = count_weights(model)
    quantize(model)
    narrow = count_weights(model)
    assert narrow.block_elements == wide.block_elements
    # A byte each, a scale for each row.
    assert narrow.head_bytes == HEAD + 4 * VOCABULARY
    assert wide.head_bytes == 4 * HEAD
    assert narrow.block_bytes < 0.4 * wide.block_bytes
    assert narrow.bytes == narrow.block_bytes + narrow.head_bytes


def test_roofline_is_the_longer_of_bytes_and_operations() -> None:
    assert roofline_seconds(Cost(bytes=5000, operations=20), RATES) == 5
    assert roofline_seconds(Cost(bytes=5000, operations=200), RATES) == 20


class FixedTimer(CPUTimer):
    """Every call takes `duration` seconds."""

    def __init__(self, duration: float):
        super().__init__()
        self.duration, self.calls = duration, 0

    def seconds(self, work: object) -> float:
        assert callable(work)
        work()
        self.calls += 1
        return self.duration


def test_rates_are_measured_on_the_device() -> None:
    found = measure_roofline(torch.device("cpu"), torch.float32, FixedTimer(2.0))
    assert found.copy_rate == found.size
    assert found.matmul_rate == found.side**3


@pytest.mark.parametrize(("duration", "calls"), [(0.25, 2 * 8), (2.0, 2 * 1)])
def test_a_long_copy_or_product_is_not_repeated(duration: float, calls: int) -> None:
    timer = FixedTimer(duration)
    measure_roofline(torch.device("cpu"), torch.float32, timer)
    assert timer.calls == calls


def test_each_measurement_has_its_floor_and_share() -> None:
    bench = Bench()
    decoder = StandIn("one", bench, lambda n: 4.0, lambda n: 8.0)
    plan = Plan(contexts=(10, 20), repeats=2, rounds=1)
    found = {
        (one.task, one.context): one
        for one in measure([subject_of(decoder)], plan, bench, roofline=RATES)
    }
    # 100 bytes a column and one more; a prompt's operations are its columns.
    assert found["decode", 20].floor == pytest.approx(2.001)
    assert found["decode", 20].share == pytest.approx(2.001 / 4)
    assert found["prefill", 20].floor == pytest.approx(max(2.001, 2.0))
    bare = measure([subject_of(decoder)], plan, bench)[0]
    assert (bare.floor, bare.share) == (None, None)


def test_floors_are_in_the_tables() -> None:
    bench = Bench()
    decoder = StandIn("one", bench, lambda n: 4.0)
    plan = Plan(
        contexts=(20,), repeats=2, rounds=1, roofline=False, gpu_metrics=False, prefill=False
    )
    bare = profile([subject_of(decoder)], plan, timer=bench)
    assert not any("floor" in title for title, _, _ in tables(bare))
    rows = (bare.measurements[0].model_copy(update={"floor": 1.0}),)
    found = bare.model_copy(update={"ceilings": RATES, "measurements": rows})
    (table,) = (one for one in tables(found) if "floor" in one[0])
    assert table[2] == [("20", "1,000 (25%)")]


def test_roofline_limits_the_prediction_of_a_long_prompt() -> None:
    # 64 s for 128 columns would make 500 s of 1000; four floors are 200 s.
    rates = RooflinePart(copy_rate=2000.0, matmul_rate=1e9, size=1, side=1)
    plan = Plan(contexts=(1000,), repeats=1, rounds=1, budget=400)
    for rates_or_none, status in ((rates, "measured"), (None, "skipped: over budget")):
        bench = Bench()
        decoder = StandIn("slow start", bench, lambda n: 0.0, lambda n: 64.0)
        found = measure([subject_of(decoder)], plan, bench, roofline=rates_or_none)
        assert found[-1].status == status


def test_roofline_limits_the_prediction_of_a_long_context() -> None:
    # 5 s a token at 10 columns would make 500 s at 1,000; launches stay, and four floors are 200 s.
    rates = RooflinePart(copy_rate=2000.0, matmul_rate=1e9, size=1, side=1)
    plan = Plan(contexts=(10, 1000), repeats=1, rounds=1, warm_up=0, budget=300, prefill=False)
    for rates_or_none, status in ((rates, "measured"), (None, "skipped: over budget")):
        bench = Bench()
        decoder = StandIn("eager", bench, lambda n: 5.0)
        found = measure([subject_of(decoder)], plan, bench, roofline=rates_or_none)
        assert [one.status for one in found] == ["measured", status]
