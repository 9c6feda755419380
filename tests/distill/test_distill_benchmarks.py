"""The benchmarks of distillation with a few small layers, on a CPU."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked_launcher
import pytest
from preloaded_process import PreloadedProcess

from mmmamba_cli.distributed import launcher

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
    words += ["--micro-rows", "1"]
    found = distill_budget.main([*words, "--profiled", "1", *TINY, "--out", str(out)])
    assert json.loads(out.read_text()) == found
    assert found["stages"]["stage3"] == {"kept": True}
    row = found["stages"]["stage1"]
    assert (row["accumulation"], row["micro_batch_rows"]) == (2, [1, 1])
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


def scale_with_forks() -> None:
    """`scale_distill.py` whose processes are forks: a spawned one imports for several seconds."""
    sys.path.insert(0, str(BENCHMARKS))
    import scale_distill

    launcher.start_processes = forked_launcher.start_processes  # type: ignore[assignment]
    scale_distill.main(sys.argv[1:])


def test_two_processes_and_one(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scale_distill

    monkeypatch.setattr(scale_distill, "launch", lambda work, setup, processes: work(setup))
    out, picture = tmp_path / "scale.json", tmp_path / "scale.png"
    words = ["--only", "stage2", "--rows", "4", "--steps", "6", "--workers", "0", *TINY]
    words += ["--out", str(out)]
    first = scale_distill.main([*words, "--gpus", "1"])
    assert first["ratios"] == []
    assert json.loads(out.read_text()) == first
    # The part that the file has is not repeated.
    (name,) = first["parts"]
    first["parts"][name]["kept"] = True
    out.write_text(json.dumps(first))
    words += ["--gpus", "1,2", "--picture", str(picture)]
    process = PreloadedProcess(scale_with_forks, words, tmp_path / "output")
    assert process.wait(timeout=300) == 0, process.text()
    found = json.loads(out.read_text())
    assert found["parts"][name]["kept"]
    (ratio,) = found["ratios"]
    assert ratio["same_losses"]
    assert (ratio["scaling"], ratio["gpus"], ratio["rows"]) == ("strong", [1, 2], 4)
    one, two = (found["parts"][f"stage2-{n}-gpus-4-rows-auto-micro-auto"] for n in (1, 2))
    # As many as the recipe's `accumulation: auto` gives them.
    assert (one["micro_batch_rows"], two["micro_batch_rows"]) == ([4], [2])
    assert len(one["losses"]) == len(two["losses"]) == 6
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
            "micro_rows": "auto",
        }

    parts = [part(1, 8, 10, 2), part(2, 8, 18, 2.0001, "shard"), part(2, 16, 19, 3, "shard")]
    strong, weak = scale_distill.ratios(dict(enumerate(parts)))
    assert (strong["scaling"], strong["speed_ratio"], strong["efficiency"]) == ("strong", 1.8, 0.9)
    assert strong["loss_difference"] == pytest.approx(5e-5)
    assert strong["same_losses"]
    assert (weak["scaling"], weak["speed_ratio"], weak["rows_per_gpu"]) == ("weak", 1.9, 8)
    # Parts of other micro batches are not compared, and those of older files had one row in each.
    older = {name: value for name, value in parts[2].items() if name != "micro_rows"}
    ones = [{**parts[0], "micro_rows": 1}, older]
    assert scale_distill.ratios(dict(enumerate([parts[0], older]))) == []
    assert [one["micro_rows"] for one in scale_distill.ratios(dict(enumerate(ones)))] == ["1"]
    parts[1]["losses"][1] = 2.1
    assert not scale_distill.ratios(dict(enumerate(parts)))[0]["same_losses"]


def test_models_in_place_beside_hovle(benchmarks: None, tmp_path: Path) -> None:
    import distill_in_place

    out = tmp_path / "in_place.json"
    parts = ["hovle-2.6b-stage2", "qwen3-vl-2b-stage1", "qwen3-vl-8b-stage3-upper"]
    # The second part is there with one row a micro batch.
    names = [f"{part}-micro-auto" for part in parts]
    kept = {name: {"kept": True} for name in (names[0], parts[1])}
    out.write_text(json.dumps({"parts": kept}))
    words = ["--rows", "2", "--micro-rows", "auto", "--steps", "1", *TINY[:1], *TINY[3:]]
    words += ["--length", "64", "--out", str(out), "--only", ",".join(parts)]
    found = distill_in_place.main(words)
    assert json.loads(out.read_text()) == found
    for name in kept:
        assert found["parts"].pop(name) == {"kept": True}
    assert list(found["parts"]) == names[1:]
    for row in found["parts"].values():
        # Warm-up, timed, the one before the profiler, profiled.
        assert len(row["losses"]) == 5
        assert row["losses"][-1] < row["losses"][0]
        assert row["tokens_per_second"] > 0
        assert (row["accumulation"], row["micro_batch_rows"]) == ("auto", [2])
        assert row["profiled"]["steps"] == 1
    stage3 = found["parts"][names[2]]
    assert stage3["learning_parameters"] > found["parts"][names[1]]["learning_parameters"]
    assert stage3["recomputation"]["layers"] == 0


def test_packed_rows_of_pictures_are_conversations_of_their_own(
    benchmarks: None, tmp_path: Path
) -> None:
    import distill_in_place

    common = ["--rows", "2", "--micro-rows", "auto", "--steps", "1", "--length", "64", "--tiny"]
    common += ["--device", "cpu", "--only", "qwen3-vl-2b-stage1"]
    parts = {}
    for name, words in (("", []), ("-packed", ["--packed"])):
        found = distill_in_place.main([*common, *words])["parts"]
        parts[name] = found[f"qwen3-vl-2b-stage1-micro-auto{name}"]
    assert parts["-packed"]["micro_batch_rows"] == [2]
    # Attention of a picture sees less, so that its outputs differ.
    assert parts["-packed"]["losses"][0] != pytest.approx(parts[""]["losses"][0], rel=1e-3)
    with pytest.raises(SystemExit):
        distill_in_place.parse(["--packed"])


def test_rows_of_pictures_are_what_the_model_reads(benchmarks: None) -> None:
    import random_qwen3_vl
    import torch

    config = random_qwen3_vl.teacher_config("2B", tiny=True)
    row = random_qwen3_vl.make_row(config, 131, 16, torch.Generator().manual_seed(0))
    ids, mask = row.inputs["input_ids"], row.token_mask
    grids = row.inputs["image_grid_thw"]
    is_image = ids == config.image_token_id
    assert row.num_tokens == ids.numel() == int(mask.sum()) == 131
    assert int(is_image.sum()) == int(grids.prod(-1).sum()) // 4 == 4 * 16
    assert len(row.inputs["pixel_values"]) == int(grids.prod(-1).sum())
    answers = row.labels != -100
    assert int(answers.sum()) == 16
    assert not (answers & is_image).any()
    assert torch.equal(row.labels[answers], ids[answers])
    joined = random_qwen3_vl.join_rows([row, row])
    assert joined.inputs["input_ids"].shape == (2, 131)
    assert (joined.num_samples, joined.num_tokens) == (2, 262)
    assert all(
        torch.equal(joined.inputs[name], torch.cat((value, value)))
        for name, value in row.inputs.items()
    )


def test_parts_of_models_in_place(
    benchmarks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import distill_in_place
    import torch

    from mmmamba_cli.distributed import World
    from mmmamba_cli.errors import MmmambaError

    named = [part.name for part in distill_in_place.parts_of("qwen3-vl-8b-stage3*,hovle*1")]
    variants = ["", "-auto", "-lora", "-upper", "-layers"]
    assert named == ["hovle-2.6b-stage1", *[f"qwen3-vl-8b-stage3{one}" for one in variants]]
    assert distill_in_place.changes_of("upper", 4)["learns"] == [
        "*.language_model.layers.2.*",
        "*.language_model.layers.3.*",
    ]
    with pytest.raises(SystemExit):
        distill_in_place.parse(["--only", "qwen2*"])
    given = distill_in_place.parse(["--only", "*2b-stage1", "--length", "64", "--tiny"])
    (part,) = distill_in_place.parts_of(given.only)
    world = World(torch.device("cpu"))
    assert distill_in_place.run_part(given, part, tmp_path, world, deadline=0) is None
    assert "stopped: no time left" in capsys.readouterr().err
    errors = (torch.OutOfMemoryError("too\nlarge"), MmmambaError("missing"), KeyError("missing"))
    for error in errors:

        def fail(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(distill_in_place, "measure", fail)
        found = distill_in_place.run_part(given, part, tmp_path, world, deadline=0)
        printed = capsys.readouterr().err
        if isinstance(error, torch.OutOfMemoryError):
            assert found == {"out_of_memory": "too", "peak_gib": 0.0}
        else:
            # The other parts go on.
            assert found is None
            assert f"{part.name} failed" in printed
            assert "missing" in printed


@pytest.mark.parametrize("reads", [3, 4])
def test_a_part_that_runs_out_of_time_is_left_out(
    benchmarks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reads: int,
) -> None:
    import scale_distill

    monkeypatch.setattr(scale_distill, "launch", lambda work, setup, processes: work(setup))
    out = tmp_path / "scale.json"
    words = ["--only", "stage1", "--rows", "1", "--gpus", "1", "--workers", "0", *TINY]
    # The deadline passes before the part, or within its first step.
    clock = iter([0.0] * reads)
    stub = SimpleNamespace(**vars(time) | {"time": lambda: next(clock, 1e6)})
    monkeypatch.setattr(scale_distill, "time", stub)
    found = scale_distill.main([*words, "--out", str(out)])
    assert found["parts"] == {}
    printed = capsys.readouterr().err
    assert "stage1-1-gpus-1-rows-auto-micro-auto stopped: no time left" in printed
    assert next(clock, None) is None


def test_parts_go_on_behind_one_that_fails(
    benchmarks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import scale_distill

    def train_part(setup: Any, world: Any) -> dict[str, Any]:
        if setup.stage == "stage2":
            raise RuntimeError("out of luck")
        return {"losses": [1.0], "tokens_per_second": 1}

    monkeypatch.setattr(scale_distill, "train_part", train_part)
    launches: list[list[str]] = []

    def launch(work: Any, group: Any, processes: int) -> Any:
        launches.append([part.stage for part in group.setups])
        return work(group)

    monkeypatch.setattr(scale_distill, "launch", launch)
    words = ["--rows", "1", "--gpus", "1", *TINY, "--out", str(tmp_path / "scale.json")]
    found = scale_distill.main(words)
    assert [part["stage"] for part in found["parts"].values()] == ["stage1", "stage3"]
    assert launches == [["stage1", "stage2", "stage3"], ["stage3"]]
    assert "out of luck" in capsys.readouterr().err


def test_wait_for_lessons(benchmarks: None, tmp_path: Path) -> None:
    import lesson_waits

    out = tmp_path / "waits.json"
    out.write_text(json.dumps({"by_workers": {"8": {"kept": True}}}))
    words = ["--tiny", "--device", "cpu", "--workers", "8,0", "--out", str(out)]
    found = lesson_waits.main([*words, "--warmup", "0", "--steps", "1"])
    assert json.loads(out.read_text()) == found
    assert found["by_workers"].pop("8") == {"kept": True}
    row = found["by_workers"]["0"]
    assert row["steps"] == 1
    # Without loader processes the lessons are drawn while training waits.
    assert 0 < row["waited_seconds"] < row["seconds"]
    assert row["wait_share"] == pytest.approx(row["waited_seconds"] / row["seconds"], abs=1e-3)
    assert found["data"].startswith("scenes:lessons?")


def test_time_of_a_gpu(benchmarks: None) -> None:
    """Its last step before the profiler and the ranges of the host do not count."""
    import random_stages
    import torch
    from torch.autograd import DeviceType

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [len(random_stages.timed_steps(one, 2, 6)) for one in (gpu, cpu)] == [3, 4]

    def event(name: str, first: float, last: float, is_user_annotation: bool = False) -> Any:
        values = {
            "name": name,
            "start_ns": first * 1e9,
            "end_ns": last * 1e9,
            "device_type": DeviceType.CUDA,
            "is_user_annotation": is_user_annotation,
        }
        return SimpleNamespace(**{key: partial(lambda x: x, x) for key, x in values.items()})

    profiler = random_stages.StepProfiler(cpu, 1, 1)
    events = [event("gemm", 0, 1), event("ncclDevKernel", 2, 3), event("FSDP::x", 0, 4, True)]
    results = SimpleNamespace(events=lambda: events)
    profiler.profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    profiler.seconds = 4.0
    found = profiler.summary()
    assert (found["gpu_busy_share"], found["communication_share"]) == (0.5, 0.25)
    assert (found["kernel_seconds"], found["communication_seconds"]) == (1, 1)


def test_parts_and_covered_time(benchmarks: None) -> None:
    import random_stages
    import scale_distill

    given = scale_distill.parse(["--only", "stage1", "--gpus", "1,4", "--weak", "8", "--kill"])
    assert [(p.gpus, p.rows) for p in scale_distill.parts_of(given, [1, 4])] == [(4, 8), (4, 32)]
    assert random_stages.covered([(5, 6), (0, 2), (1, 3), (2, 2.5)]) == 4
    for words in (["--steps", "2"], ["--micro-rows", "0"], ["--micro-rows", "all"]):
        with pytest.raises(SystemExit):
            scale_distill.parse(words)
    assert scale_distill.parse(["--micro-rows", "2"]).micro_rows == 2
    accumulations = [random_stages.accumulation_of(8, micro, 2) for micro in (1, 2, 8, "auto")]
    assert accumulations == [4, 2, 1, "auto"]
