"""The full-size benchmark: its marks with simulated decoders, and a whole run on a small model."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import Bench, StandIn, subject_of

from mmmamba_cli.profiling import Plan, profile
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, EAGER, GENERATOR, TUNED
from mmmamba_cli.profiling.result import Throughput

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode_full_size.py"


@pytest.fixture(scope="module")
def full_size() -> Any:
    spec = importlib.util.spec_from_file_location("decode_full_size", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def planted(error: float = 0.0) -> Any:
    bench = Bench()

    def one(name: str, step: float, read: float, weights: int) -> StandIn:
        return StandIn(name, bench, lambda n: step, lambda n: read, weight_bytes=weights)

    linear = one("linear", 0.0015, 0.8, 2000)
    linear.error = error
    decoders = [
        (one(AS_SHIPPED, 0.05, 3.0, 10000), AS_SHIPPED),
        (one(TUNED, 0.0076, 0.04, 10000), TUNED),
        (linear, "student"),
        (one("linear int8", 0.001, 0.9, 1000), "student"),
    ]
    subjects = [subject_of(decoder, role) for decoder, role in decoders]
    for name, way in (("gated_delta", GENERATOR), ("kda", EAGER)):
        subject = subject_of(one(f"linear {name}", 0.0018, 0.9, 2000), "student")
        info = replace(subject.info, mixers=(name,), way=way)
        subjects.append(replace(subject, info=info))
    plan = Plan(contexts=(10, 40), repeats=1, roofline=False, gpu_metrics=False)
    found = profile(subjects, plan, timer=bench, on_wrong="measure")
    best = Throughput(
        subject="linear", context=40, batch=64, status="measured", seconds=0.003, best=True
    )
    return found.model_copy(update={"throughput": (best,)})


def test_marks_are_compared_with_measurements(full_size: Any) -> None:
    rows = {row.what: row for row in full_size.Marks(planted(), 40, 10).rows()}
    verdicts = {what: row.verdict for what, row in rows.items()}
    assert verdicts["a token at 40: linear"] == "reached"
    assert verdicts["a token at 40: linear int8"] == "reached"
    assert verdicts["a token at 40: teacher tuned"] == "NOT REACHED"
    assert verdicts["a token at 40: hybrid-8"] == "NOT MEASURED"
    faster = rows["a token at 40: linear faster than the teacher as shipped"]
    assert (faster.value, faster.verdict) == (pytest.approx(0.05 / 0.0015), "reached")
    assert rows["a token at 40: linear faster than the teacher tuned"].value == pytest.approx(
        0.0076 / 0.0015
    )
    flat = rows["a token: linear, slowest over fastest context, 10 to 40"]
    assert (flat.value, flat.verdict) == (pytest.approx(0, abs=1e-6), "reached")
    # A cache of ten bytes a column, and what a step holds.
    below = rows["memory at 40: linear below the teacher as shipped"]
    assert below.value == pytest.approx(100 * (1 - 2407 / 10407))
    assert below.verdict == "reached"
    most = rows["tokens a second at 40: linear at its best batch, batch 64"]
    assert (most.value, most.verdict) == (pytest.approx(64 / 0.003), "reached")
    assert rows["prefill of 40: linear"].verdict == "reached"
    short = rows["prefill of 10: linear over the teacher tuned"]
    assert (short.value, short.verdict) == (pytest.approx(0.04 / 0.8), "NOT REACHED")
    assert all(row.gate == 0 for row in rows.values() if row.value is not None)


def test_other_mixers_are_compared_with_linear(full_size: Any) -> None:
    rows = {row.what: row for row in full_size.Marks(planted(), 40, 10).mixers()}
    slower = rows["a token at 40: linear gated_delta over linear"]
    assert slower.value == pytest.approx(1.2) and slower.verdict == "NOT REACHED"
    assert rows["a token at 40: linear kda over linear"].verdict == ""
    assert rows["a token at 40: linear kda"].value == pytest.approx(1.8)
    assert len(rows) == 4


def test_a_wrong_decoder_reaches_no_mark(full_size: Any) -> None:
    rows = {row.what: row for row in full_size.Marks(planted(error=1.0), 40, 10).rows()}
    verdicts = {what: row.verdict for what, row in rows.items()}
    assert verdicts["a token at 40: linear"] == "GATE RED"
    assert verdicts["a token at 40: linear faster than the teacher as shipped"] == "GATE RED"
    assert verdicts["a token at 40: linear int8"] == "reached"


def test_whole_benchmark_on_a_small_model(
    full_size: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    words = ["--random", "hovle-8m", "--contexts", "8,24", "--at", "16", "--short", "8"]
    words += ["--device", "cpu", "--repeats", "2", "--seconds", "10000", "--most", "4"]
    rows = full_size.main([*words, "--out", str(out), "--folder", str(tmp_path / "profile")])
    told = json.loads(out.read_text())
    assert [row["what"] for row in told["rows"]] == [row.what for row in rows]
    assert not [row.what for row in rows if row.value is None]
    assert told["profile"]["gate"]["green"]
    names = [one["name"] for one in told["profile"]["subjects"]]
    assert names == [AS_SHIPPED, TUNED, "linear", "hybrid-4", "hybrid-8", "linear int8"]
    assert "a token at 16: linear | " in capsys.readouterr().out
    assert (tmp_path / "profile" / "profile.json").is_file()
