"""`mmmamba distill --dry-run`: what a recipe needs and does, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill_in_place import seeded as in_place
from typer.testing import CliRunner

from mmmamba_cli.__main__ import main
from mmmamba_cli.cli.app import app
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.stage_memory import MicroBatchSize, estimate_memory
from mmmamba_cli.distill.stage_models import open_stage_models, trainable_of
from mmmamba_cli.distill.stage_shapes import shapes_of
from mmmamba_cli.errors import MmmambaError, RecipeError
from mmmamba_cli.recipe import Stage, dump_recipe, load_recipe
from mmmamba_cli.runs import Run

__all__ = ["in_place"]


def run_distill(folder: Path, *words: object, data: str = "train.jsonl") -> Any:
    given = ("distill", "--run", folder / "run", "--device", "cpu", "--data", folder / data)
    return CliRunner().invoke(
        app,
        [str(word) for word in (*given, "--image-root", folder, *words)],
        catch_exceptions=False,
    )


def dry(folder: Path, *words: object) -> dict[str, Any]:
    return json.loads(run_distill(folder, "--dry-run", "--json", *words).stdout)


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of each file and folder."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (one.st_size, one.st_mtime_ns) for path, one in stats.items()}


@pytest.fixture(params=["holistic", "in place"])
def folder(request: pytest.FixtureRequest, seeded: Path, in_place: Path) -> Path:
    """A seeded run of each kind of student, with its conversations; never changed."""
    return seeded if request.param == "holistic" else in_place


LENGTH = ("--set", "data.max_length=400")


def test_a_report_writes_nothing(folder: Path) -> None:
    before = files_of(folder)
    report = dry(folder, "--held-out", folder / "held_out.jsonl", *LENGTH)
    assert files_of(folder) == before
    stages = report["stages"]
    assert [one["stage"] for one in stages] == ["stage1", "stage2", "stage3"]
    assert [len(one["attention_layers"]) for one in stages] == [0, 0, 1]
    assert report["fits_memory"] and report["fits_disk"]
    assert report["seconds"] is None and all(one["rate"] is None for one in stages)
    product = Run(folder / "run").open_any_product("seed")
    stored = sum(product.source.info(name).nbytes for name in product.source.names)
    assert stages[0]["disk"]["product"] == stages[0]["disk"]["best"] == stored
    for one in stages:
        memory = one["memory"]
        assert memory["gradients"] == memory["master_weights"] == 4 * one["parameters"]
        assert memory["moments"] == 8 * one["parameters"]
        assert one["disk"]["states"] == (2 * 12 + 2 * 4) * one["parameters"]
        assert memory["activations"] < one["memory_at_max_length"]["activations"]
    parts = [one["disk"]["product"] + one["disk"]["best"] for one in stages]
    peaks = [sum(parts[: i + 1]) + one["disk"]["states"] for i, one in enumerate(stages)]
    assert report["disk"] == max(peaks) + stages[2]["disk"]["product"]


def test_micro_batches_of_accumulation_auto(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows above the limit are alone, here as with a number of 2."""
    monkeypatch.setattr("mmmamba_cli.distill.micro_batches.MAX_LAYER_COLUMNS", 50)
    one, two, auto = (
        dry(folder, "--stage", "1", *LENGTH, "--set", f"stages.stage1.accumulation={number}")
        for number in (1, 2, "auto")
    )
    (whole,), (parts,), (found,) = (report["stages"] for report in (one, two, auto))
    numbers = [stage["first_batch"]["micro_batches"] for stage in (whole, parts, found)]
    assert numbers == [1, 2, 2]
    for memory in ("memory", "memory_at_max_length"):
        assert found[memory] == parts[memory]
        assert found[memory]["activations"] < whole[memory]["activations"]
    words = ("--dry-run", "--stage", "1", *LENGTH, "--set", "stages.stage1.accumulation=auto")
    (line,) = (x for x in run_distill(folder, *words).stdout.splitlines() if "micro batches," in x)
    assert line.split() == ["micro", "batches,", "first", "step", "2"]


def test_what_learns_is_what_training_says(folder: Path) -> None:
    run = Run(folder / "run")
    models = open_stage_models(run, "seed", None)
    stage = load_recipe("smoke").stages[1]
    names, _ = trainable_of(models, stage)
    (found,) = (one for one in dry(folder, *LENGTH)["stages"] if one["stage"] == "stage2")
    assert sum(one["tensors"] for one in found["learns"]) == len(names)
    pair = models.load(names, PairPlacement(torch.float32, "fp32", torch.device("cpu")))
    parameters = pair.trainable_parameters().values()
    assert found["parameters"] == sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_are_those_that_a_stage_loads(folder: Path, precision: str) -> None:
    """Bytes of all tensors of both models, a shared one once."""
    run = Run(folder / "run")
    models = open_stage_models(run, "seed", None)
    stage = load_recipe("smoke").stages[1].model_copy(update={"precision": precision})
    names, _ = trainable_of(models, stage)
    product = getattr(torch, run.product("seed").dtype)
    pair = models.load(names, PairPlacement(product, precision, torch.device("cpu")))
    held = {p for model in (pair.teacher, pair.student) for p in model.parameters()}
    masters = set(pair.trainable_parameters().values())
    memory = estimate_memory(shapes_of(models.student), stage, MicroBatchSize(1, 8, 8))
    assert memory.master_weights == sum(p.nbytes for p in masters)
    assert memory.frozen_weights == sum(p.nbytes for p in held - masters)


def test_the_first_batch_is_shown_with_its_answers(folder: Path) -> None:
    (first, *_) = dry(folder, *LENGTH)["stages"]
    batch = first["first_batch"]
    runs = [run for row in batch["rows"] for run in row["runs"]]
    answers = [run["text"] for run in runs if run["is_answer"]]
    lines = (folder / "train.jsonl").read_text().splitlines()
    known = [json.loads(line)["conversations"][1]["value"] for line in lines]
    assert len(answers) == batch["samples"] == 2 and batch["bad"] == []
    assert all(any(one in answer for one in known) for answer in answers)
    assert any("What is it?" in run["text"] for run in runs if not run["is_answer"])
    shown = run_distill(folder, "--dry-run", *LENGTH).stdout
    assert f"⟦{answers[0].rstrip()}" in shown and "nothing is trained" in shown
    assert "memory: fits" in shown and "time: unknown for stage1, stage2, stage3" in shown


PACKED = ("--set", "data.batching=packed")


def check_says(folder: Path, packs: bool) -> None:
    """`data check` says whether rows of the run's model can be packed."""
    words = ("data", "check", folder / "train.jsonl", "--run", folder / "run")
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert ("cannot be packed" in result.stdout) is not packs
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert json.loads(result.stdout)["can_be_packed"] is packs


def test_rows_of_both_kinds_of_students_are_packed(folder: Path) -> None:
    report = dry(folder, *LENGTH, *PACKED)
    assert not any("data.batching" in note for note in report["notes"])
    assert report["stages"][0]["first_batch"]["batching"] == "packed"
    check_says(folder, packs=True)


def test_rows_that_cannot_be_packed_are_said(
    in_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmmamba_cli.teachers.packed_rows.PACKED_VISION_FAMILIES", frozenset())
    reason = "rows of idefics3 with a text decoder llama hold one conversation each"
    check_says(in_place, packs=False)
    # A recipe that packs is followed as far as the family allows.
    recipe = tmp_path / "packed.yaml"
    text = dump_recipe(load_recipe("smoke"))
    recipe.write_text(text.replace("batching: bucketed", "batching: packed"))
    report = dry(in_place, *LENGTH, "--recipe", recipe)
    (note,) = (note for note in report["notes"] if "batching" in note)
    assert note.startswith(f"data.batching: bucketed in place of packed, since {reason}")
    assert report["stages"][0]["first_batch"]["batching"] == "bucketed"
    # A setting of the command line is not replaced.
    before = files_of(in_place).keys()
    for more in (("--dry-run",), ()):
        with pytest.raises(RecipeError) as refused:
            run_distill(in_place, *more, *LENGTH, *PACKED)
        assert refused.value.message.startswith(f"data.batching is set to packed, and {reason}")
        assert refused.value.hint == "set data.batching to bucketed or padded"
    assert files_of(in_place).keys() == before


def test_processes_share_a_batch(in_place: Path) -> None:
    alone, shared = (dry(in_place, *LENGTH, *more) for more in ((), ("--gpus", "2")))
    assert (alone["processes"], shared["processes"]) == (1, 2)
    for one, two in zip(alone["stages"][:2], shared["stages"][:2], strict=True):
        batches = one["first_batch"], two["first_batch"]
        assert [batch["samples"] for batch in batches] == [2, 1]
        assert one["memory"]["moments"] == two["memory"]["moments"]
        memories = (stage["memory_at_max_length"]["activations"] for stage in (one, two))
        assert next(memories) == 2 * next(memories)


def test_a_measured_step_gives_a_time(in_place: Path) -> None:
    before = files_of(in_place)
    report = dry(in_place, "--measure", *LENGTH)
    assert files_of(in_place) == before
    one, two, three = report["stages"]
    for stage in (one, two):
        assert stage["rate"]["source"] == "a step on cpu"
        speed = stage["rate"]["tokens_per_second"]
        assert stage["seconds"] == pytest.approx(stage["tokens"] / speed)
    assert three["rate"] is None and report["seconds"] is None
    assert any("stage3 was not measured" in note for note in report["notes"])


def test_rates_of_earlier_stages(seeded: Path, work: Path) -> None:
    """Of the same kind of stage only."""
    for name in ("train.jsonl", "images"):
        (work / name).symlink_to(seeded / name)
    assert run_distill(work, "--stage", "1", *LENGTH).exit_code == 0
    made = Run(work / "run").product("stage1").metrics
    report = dry(work, "--stage", "1,2", "--from", "seed", *LENGTH)
    one, two = report["stages"]
    assert one["rate"]["source"] == "stage1 of this run" and two["rate"] is None
    assert one["rate"]["tokens_per_second"] == pytest.approx(made["tokens"] / made["seconds"])


def test_trained_parameters_are_no_longer_the_teachers(seeded: Path) -> None:
    """Stage 2 trains W_Q, W_K and W_V; a later stage that freezes them holds both versions."""
    models = open_stage_models(Run(seeded / "run"), "seed", None)
    shapes = shapes_of(models.student)
    stage = Stage(
        name="s", learns="new", loss="mixer-mse", inputs="teacher", steps=1, batch_size=1, lr=1e-3,
        precision="fp32",
    )  # fmt: skip
    size = MicroBatchSize(1, 8, 8)
    query = "model.layers.0.mixer.q_proj.weight"
    alone, both = (estimate_memory(shapes, stage, size, known) for known in ((), {query}))
    rows, columns = shapes.student[query]
    assert both.frozen_weights - alone.frozen_weights == 4 * rows * columns


def test_bad_data_is_refused(in_place: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["distill", "--dry-run", "--run", str(in_place / "run"), "--device", "cpu", *LENGTH]
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"conversations": []}\n{"no": 1}\n')
    for source, said in (
        (tmp_path / "none.jsonl", "none.jsonl"),
        (broken, "none of the 2 samples of the first batch could be read"),
    ):
        with pytest.raises(SystemExit) as ended:
            main_with([*given, "--data", str(source)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    with pytest.raises(MmmambaError, match="--measure is an option of --dry-run"):
        run_distill(in_place, "--measure", *LENGTH)
    with pytest.raises(MmmambaError, match="--measure times a step in one process"):
        run_distill(in_place, "--measure", "--dry-run", "--gpus", "2", *LENGTH)


def main_with(words: list[str]) -> None:
    import sys

    before, sys.argv = sys.argv, ["mmmamba", *words]
    try:
        main()
    finally:
        sys.argv = before
