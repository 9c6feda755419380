"""benchmarks/distill_budget.py and scale_distill.py with three small layers, on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--tiny", "--length", "32", "--device", "cpu"]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is on the path, also of the processes that a benchmark starts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmark"])


def test_budget_of_a_stage(benchmarks: None, tmp_path: Path) -> None:
    import distill_budget

    out = tmp_path / "budget.json"
    out.write_text(json.dumps({"stages": {"stage3": {"kept": True}}}))
    words = ["--stages", "stage1", "--rows", "2", "--warmup", "1", "--steps", "3"]
    found = distill_budget.main([*words, "--profiled", "1", *TINY, "--out", str(out)])
    assert json.loads(out.read_text()) == found
    assert found["stages"]["stage3"] == {"kept": True}
    row = found["stages"]["stage1"]
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(2 * 32, rel=0.2)
    host = row["host_seconds"]
    assert set(host) == {*distill_budget.PARTS, "wait for data", "logging", "rest"}
    assert sum(host.values()) == pytest.approx(row["profiled"]["seconds"], abs=1e-3)
    assert row["profiled"]["steps"] == 1
    assert "host: optimiser" in distill_budget.table("stage1", row)
    # Other load may stop the process for longer than a step takes: then a step is profiled again.
    for _ in range(10):
        if host["forward and backward"] > max(host["optimiser"], host["read"]) > 0:
            return
        found = distill_budget.main([*words, "--profiled", "1", *TINY, "--out", str(out)])
        host = found["stages"]["stage1"]["host_seconds"]
    pytest.fail(f"no step in which the forward and backward passes take longest: {host}")


def test_two_processes_and_one(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scale_distill

    start = scale_distill.launch
    launched: list[int] = []

    def launch(work: Any, setup: Any, processes: int) -> Any:
        launched.append(processes)
        # A start takes longer than the steps.
        return work(setup) if processes == 1 else start(work, setup, processes)

    monkeypatch.setattr(scale_distill, "launch", launch)
    out, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    words = ["--only", "stage2", "--rows", "4", "--steps", "5", "--workers", "0", *TINY]
    words += ["--out", str(out)]
    first = scale_distill.main([*words, "--gpus", "1"])
    assert first["ratios"] == []
    found = scale_distill.main([*words, "--gpus", "1,2", "--picture", str(picture)])
    # The part that the file has is not repeated.
    assert launched == [1, 2]
    assert json.loads(out.read_text()) == found
    (ratio,) = found["ratios"]
    assert ratio["same_losses"]
    assert (ratio["scaling"], ratio["gpus"], ratio["rows"]) == ("strong", [1, 2], 4)
    one, two = (found["parts"][f"stage2-{n}-gpus-4-rows-auto"] for n in (1, 2))
    assert len(one["losses"]) == len(two["losses"]) == 5
    assert one["losses"][0] != one["losses"][-1]
    assert (one["collectives_per_step"], two["mode"]) == (0, "replicate")
    # Counts, sums with flags, whether to stop, and one bucket.
    assert two["collectives_per_step"] >= 4
    assert picture.stat().st_size > 0


def test_ratios(benchmarks: None) -> None:
    import scale_distill

    def part(gpus: int, rows: int, speed: float, loss: float, mode: str = "auto") -> Any:
        return {"stage": "stage3", "gpus": gpus, "rows": rows, "parallel": mode} | {
            "tokens_per_second": speed,
            "losses": [1.0, loss],
        }

    parts = [part(1, 8, 10, 2), part(2, 8, 18, 2.0001, "shard"), part(2, 16, 19, 3, "shard")]
    strong, weak = scale_distill.ratios(dict(enumerate(parts)))
    assert (strong["scaling"], strong["speed_ratio"], strong["efficiency"]) == ("strong", 1.8, 0.9)
    assert strong["loss_difference"] == pytest.approx(5e-5)
    assert strong["same_losses"]
    assert (weak["scaling"], weak["speed_ratio"], weak["rows_per_gpu"]) == ("weak", 1.9, 8)
    parts[1]["losses"][1] = 2.1
    assert not scale_distill.ratios(dict(enumerate(parts)))[0]["same_losses"]


def test_parts_and_covered_time(benchmarks: None) -> None:
    import random_stages
    import scale_distill

    given = scale_distill.parse(["--only", "stage1", "--gpus", "1,4", "--weak", "8", "--kill"])
    assert [(p.gpus, p.rows) for p in scale_distill.parts_of(given, [1, 4])] == [(4, 8), (4, 32)]
    assert random_stages.covered([(5, 6), (0, 2), (1, 3), (2, 2.5)]) == 4
    with pytest.raises(SystemExit):
        scale_distill.parse(["--steps", "2"])
