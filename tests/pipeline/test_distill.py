"""`mmmamba distill` end to end: recipes, stages by name, kills, resuming, errors."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from preloaded_process import PreloadedProcess
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import mmmamba_cli
from mmmamba_cli.__main__ import main
from mmmamba_cli.cli.app import app
from mmmamba_cli.distill import StageCallbacks, Stopped, micro_batches, trainer
from mmmamba_cli.distill import distill as library_distill
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run

SETTINGS = ("--set", "data.max_length=400")
# Number of kills in the long-running test; use MMMAMBA_KILLS=20 for the full test.
KILLS = int(os.environ.get("MMMAMBA_KILLS", "3"))


def mmmamba(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def done(*words: object) -> Result:
    result = mmmamba(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*words: object) -> str:
    result = mmmamba(*words)
    assert isinstance(result.exception, MmmambaError), result.output
    return str(result.exception)


def distill(work: Path, seeded: Path, *more: object) -> tuple[object, ...]:
    """The words of a `distill` command on the data of `seeded`."""
    data = ("--data", seeded / "train.jsonl", "--image-root", seeded)
    return ("distill", "--run", work / "run", *data, *SETTINGS, *more)


def weights(work: Path, name: str) -> dict[str, Tensor]:
    return load_file(work / "run/products" / name / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.usefixtures("loss_plots")
def test_the_whole_recipe(work: Path, seeded: Path) -> None:
    done(*distill(work, seeded, "--held-out", seeded / "held_out.jsonl"))
    run = Run(work / "run")
    products = run.products()
    chain = ["seed", "stage1", "stage2", "hybrid-1", "hybrid-1-stage3"]
    assert [name for name in products if not name.endswith("-best")] == chain
    assert run.record.current == "hybrid-1-stage3"
    last = products["hybrid-1-stage3"]
    assert (last.stages, last.final) == (("stage1", "stage2", "stage3"), True)
    assert last.notes == ()
    assert last.metrics["step"] == 4
    assert last.metrics["held_out"]["tokens"] > 0
    before, after = weights(work, "seed"), weights(work, "stage1")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".mixer." in n and "_proj" not in n.replace("g_proj", "") for n in changed - DT)
    rows = [json.loads(x) for x in (work / "run/products/stage1/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "held_out/agreement" in rows[1]
    assert (work / "run/products/stage1/losses.png").read_bytes().startswith(b"\x89PNG")
    assert not list((work / "run/training").iterdir())
    model = mmmamba_cli.load(work / "run/products/hybrid-1-stage3")
    assert model.config.attention_layers == (0,)
    assert "nothing is left to do" in refused(*distill(work, seeded))


DT = {f"model.layers.{i}.mixer.dt_proj.weight" for i in range(8)}


def test_stage_by_stage_equals_one_command(work: Path, seeded: Path) -> None:
    whole = work.parent / "whole"
    shutil.copytree(work, whole)
    done(*distill(whole, seeded))
    done(*distill(work, seeded, "--stage", "1"))
    done(*distill(work, seeded, "--stage", "stage2"))
    done("hybridize", "--run", work / "run", "--attn-layers", "1")
    done(*distill(work, seeded))
    assert same(weights(work, "hybrid-1-stage3"), weights(whole, "hybrid-1-stage3"))


def test_a_linear_plan_makes_no_hybrid(work: Path, seeded: Path) -> None:
    done(*distill(work, seeded, "--set", "layers.attention=0"))
    assert Run(work / "run").record.current == "linear-stage3"


def test_a_hybrid_of_the_seed_goes_through_all_stages(work: Path, seeded: Path) -> None:
    done("hybridize", "--run", work / "run", "--layers", "1,4")
    done(*distill(work, seeded))
    product = Run(work / "run").product("hybrid-at-1-4-stage3")
    assert product.attention_layers == (1, 4)
    assert product.stages == ("stage1", "stage2", "stage3")
    teacher, student = weights(work, "hybrid-at-1-4"), weights(work, "hybrid-at-1-4-stage3")
    kept = [n for n in teacher if n.startswith("model.layers.4.")]
    assert all(torch.equal(teacher[n], student[n]) for n in kept)


def test_an_earlier_stage_is_found_and_repeated(work: Path, seeded: Path) -> None:
    done(*distill(work, seeded, "--stage", "1,2"))
    assert "already has a product" not in done(*distill(work, seeded, "--stage", "1")).output
    first = weights(work, "stage1")
    repeated = ("--stage", "1", "--overwrite", "--set", "stages.stage1.lr=1e-2")
    done(*distill(work, seeded, *repeated))
    assert not same(first, weights(work, "stage1"))
    # Products of the old stage1 are not children of the new one.
    assert "made from another parent" in refused(
        *distill(work, seeded, "--stage", "2", "--from", "stage1")
    )


def test_errors_before_loading(work: Path, seeded: Path) -> None:
    message = refused(*distill(work, seeded, "--stage", "3"))
    assert "stage3 starts from a product that has done stage1, stage2" in message
    assert "no such stage" in refused(*distill(work, seeded, "--stage", "stage9"))
    assert "recipe's order" in refused(*distill(work, seeded, "--stage", "2,1"))
    assert "data.train is null" in refused("distill", "--run", work / "run")
    assert "does not exist" in refused("distill", "--run", work / "run", "--data", "gone.jsonl")
    empty = work / "empty.jsonl"
    empty.write_text("\n\n")
    assert "no samples" in refused("distill", "--run", work / "run", "--data", empty)
    assert "matches no parameter" in refused(
        *distill(work, seeded, "--set", "stages.stage1.learns=['*.nothing']")
    )
    too_many = refused(*distill(work, seeded, "--set", "layers.attention=9"))
    assert "must be from 0 to 8" in too_many and "--set layers.attention=N" in too_many
    assert list(Run(work / "run").products()) == ["seed"]
    assert not (work / "run/training").exists() or not list((work / "run/training").glob("*/*"))


def test_a_changed_teacher_or_product_is_refused(work: Path, seeded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(seeded, other, ignore=shutil.ignore_patterns("run"))
    state = torch.load(other / "hovle.ckpt")
    next(iter(state["state_dict"].values()))[0] += 1
    torch.save(state, other / "hovle.ckpt")
    message = refused(*distill(work, seeded, "--teacher", other / "hovle.ckpt"))
    assert "is not the teacher" in message
    file = work / "run/products/seed/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "was changed since it was written" in refused(*distill(work, seeded))


def test_resuming_with_other_settings(work: Path, seeded: Path) -> None:
    killed_at(work, seeded, "stage1", 2)
    changed = ("--set", "stages.stage1.lr=2e-3")
    message = refused(*distill(work, seeded, *changed))
    assert "stages.stage1.lr: 0.001 -> 0.002" in message
    done(*distill(work, seeded, "--stage", "1", *changed, "--force"))
    assert Run(work / "run").record.current == "stage1"


@pytest.mark.parametrize("accumulation", [2, "auto"])
def test_accumulation_may_change_when_resuming(
    accumulation: int | str, work: Path, seeded: Path
) -> None:
    killed_at(work, seeded, "stage1", 2)
    more = ("--set", f"stages.stage1.accumulation={accumulation}", "--set", "data.workers=1")
    done(*distill(work, seeded, "--stage", "1", *more))


@pytest.mark.parametrize("columns", [50, 10_000])
def test_out_of_memory_names_more_micro_batches_than_there_were(
    columns: int, work: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of eight rows has more than 50 columns."""

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_accumulate", full)
    monkeypatch.setattr(micro_batches, "MAX_LAYER_COLUMNS", columns)
    words = ("stages.stage1.accumulation=auto", "stages.stage1.batch_size=8")
    message = refused(
        *distill(work, seeded, "--stage", "1", *(x for w in words for x in ("--set", w)))
    )
    assert "stage1 ran out of device memory after step 0" in message
    assert ("stages.stage1.accumulation=2" in message) is (columns == 10_000)
    assert "stages.stage1.accumulation=4" not in message


def test_too_many_unreadable_samples(work: Path, seeded: Path) -> None:
    broken = work / "broken.jsonl"
    lines = (seeded / "train.jsonl").read_text().splitlines()
    broken.write_text("\n".join(lines[:6] + ["{not json"] * 6))
    words = ("distill", "--run", work / "run", "--data", broken, "--image-root", seeded, *SETTINGS)
    message = refused(*words, "--set", "data.max_bad_share=0.01", "--set", "data.shuffle=false",
                      "--set", "stages.stage1.batch_size=8")  # fmt: skip
    assert "broken.jsonl:7" in message
    assert "max_bad_share" in message
    patient = ("--set", "data.max_bad_share=0.9", "--set", "stages.stage1.batch_size=4")
    done(*words, "--stage", "1", *patient, "--overwrite")
    assert Run(work / "run").product("stage1").metrics["bad_samples"] > 0


def killed_at(work: Path, seeded: Path, product: str, step: int, *more: object) -> None:
    """Run the command and kill it once the state of `step` exists, before the product does."""
    process = start_preloaded(work, seeded, "--set", "stages.stage1.steps=400", *more)
    state = work / f"run/training/{product}/step-{step:08d}/state.json"
    process.wait_for(state.exists)
    process.kill()
    process.wait()
    # The stage was long so that the kill hits it; resume it with the usual length.
    for file in (work / "run/training" / product).glob("step-*/state.json"):
        record = json.loads(file.read_text())
        record["settings"]["stage"]["steps"] = 4
        file.write_text(json.dumps(record))
    for folder in (work / "run/training" / product).glob("step-*"):
        if int(folder.name[5:]) > 4:
            pytest.fail("the stage ran too far to be resumed")


def start_preloaded(work: Path, seeded: Path, *more: object) -> PreloadedProcess:
    words = [str(word) for word in distill(work, seeded, *more)]
    return PreloadedProcess(main, words, work.parent / "output")


def test_kills_and_resuming_give_the_same_bits(work: Path, seeded: Path) -> None:
    """SIGKILL at random moments of the recipe, resumed each time."""
    whole = work.parent / "whole"
    shutil.copytree(work, whole)
    more = ("--set", "stages.stage2.save_every=1", "--held-out", seeded / "held_out.jsonl")
    started = time.monotonic()
    process = start_preloaded(whole, seeded, *more)
    assert process.wait() == 0, process.text()
    length = time.monotonic() - started
    rng = random.Random(os.environ.get("MMMAMBA_KILLS"))
    for _ in range(KILLS):
        process = start_preloaded(work, seeded, *more)
        try:
            process.wait(timeout=length * rng.uniform(0.05, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    final = "hybrid-1-stage3"
    if Run(work / "run").record.current != final:
        process = start_preloaded(work, seeded, *more)
        assert process.wait() == 0, process.text()
    for name in ("stage1", "stage2", final):
        assert same(weights(work, name), weights(whole, name)), name
        rows = [json.loads(x) for x in (work / f"run/products/{name}/metrics.jsonl").open()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(number: int, workers: int, work: Path, seeded: Path) -> None:
    """Sent to all processes of the command, as by a terminal or scheduler."""
    many = ("--set", "stages.stage1.steps=100000", "--set", f"data.workers={workers}")
    process = start_preloaded(work, seeded, *many, "--stage", "1")
    training = work / "run/training/stage1"
    process.wait_for(lambda: list(training.glob("step-*/state.json")))
    os.killpg(process.pid, number)
    code, output = process.wait(timeout=120), process.text()
    assert code == 130, output
    assert "stopped and saved" in output
    assert output.count("stopping after this step") == 1
    (state,) = training.glob("step-*")
    metrics = [json.loads(x) for x in (training / "metrics.jsonl").open()]
    assert metrics[-1]["step"] == int(state.name[5:])


def test_a_kill_after_writing_the_product_is_completed(work: Path, seeded: Path) -> None:
    """The product exists, but is not current, and the training states still exist."""
    done(*distill(work, seeded, "--stage", "1"))
    run, product = Run(work / "run"), work / "run/products/stage1"
    training = work / "run/training/stage1"
    (training / "step-00000004").mkdir(parents=True)
    (product / "metrics.jsonl").rename(training / "metrics.jsonl")
    run.set_current("seed")
    result = done(*distill(work, seeded, "--stage", "1"))
    assert "stage1 is finished already; --overwrite repeats it" in result.output
    assert run.record.current == "stage1"
    assert not training.exists()
    assert (product / "metrics.jsonl").is_file()


def test_a_stop_between_stages(work: Path, seeded: Path) -> None:
    run = Run(work / "run")
    overrides = {"data.train": str(seeded / "train.jsonl"), "data.image_root": str(seeded)}
    recipe = load_recipe("smoke", overrides=overrides)
    callbacks = StageCallbacks(
        lambda text: None,
        lambda *_: None,
        lambda result: None,
        lambda: "stage1" in run.products(),
    )
    with pytest.raises(Stopped):
        library_distill(run, recipe, World(torch.device("cpu")), callbacks)
    assert run.record.current == "stage1"
    assert not list((work / "run/training").iterdir())


def test_another_held_out_set_resets_the_best_student(work: Path, seeded: Path) -> None:
    killed_at(work, seeded, "stage1", 2)
    for file in (work / "run/training/stage1").glob("step-*/state.json"):
        record = json.loads(file.read_text())
        record["progress"] |= {"best_step": 1, "best_loss": 0.0}
        record["settings"]["data"]["held_out"] = "other.jsonl"
        file.write_text(json.dumps(record))
    done(*distill(work, seeded, "--stage", "1", "--held-out", seeded / "held_out.jsonl"))
    metrics = Run(work / "run").product("stage1").metrics
    assert metrics["best_loss"] > 0
    assert metrics["best_step"] > 1


def test_layer_losses_need_a_trainable_layer(work: Path, seeded: Path) -> None:
    norm = ("--set", "stages.stage1.learns=[model.norm.weight]")
    assert "no linear layer learns" in refused(*distill(work, seeded, *norm))


def test_metrics_after_the_resumed_step_are_removed(work: Path, seeded: Path) -> None:
    killed_at(work, seeded, "stage1", 2)
    metrics = work / "run/training/stage1/metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "loss": 1.0, "terms": {}}\n{"step": 5, "lo')
    done(*distill(work, seeded, "--stage", "1"))
    rows = [json.loads(x) for x in (work / "run/products/stage1/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "gradient_norm" in rows[3]


def test_unreadable_held_out_samples(work: Path, seeded: Path, tmp_path: Path) -> None:
    """Some: listed and counted. All: an error before the first step, and nothing is written."""
    lines = (seeded / "held_out.jsonl").read_text().splitlines()
    some, none = tmp_path / "some.jsonl", tmp_path / "none.jsonl"
    some.write_text("\n".join(["{broken", *lines[1:]]) + "\n")
    none.write_text("{broken\n" * 3)
    result = done(*distill(work, seeded, "--stage", "1", "--held-out", some))
    assert result.output.count("skipped held-out sample some.jsonl:1: is not JSON") == 1
    assert "1 of 4 samples could not be read" in result.output
    metrics = Run(work / "run").product("stage1").metrics
    assert (metrics["held_out"]["samples"], metrics["held_out"]["bad_samples"]) == (3, 1)
    message = refused(*distill(work, seeded, "--stage", "2", "--held-out", none))
    assert message.startswith("none of the 3 held-out samples can be read; the first: none.jsonl:1")
    assert list(Run(work / "run").products())[-1] == "stage1"


def test_a_loss_that_does_not_depend_on_trainable_parameters(work: Path, seeded: Path) -> None:
    oriented = ("--set", "stages.stage1.loss=matrix-orientation")
    message = refused(*distill(work, seeded, "--stage", "1", *oriented))
    assert "stages.stage1.learns: loss matrix-orientation does not depend on" in message
    assert not (work / "run/training").exists()


@pytest.mark.usefixtures("loss_plots")
def test_overwriting_a_stage_replaces_its_metrics_and_plot(work: Path, seeded: Path) -> None:
    """Metrics and loss plot belong to the new training."""
    plot = work / "run/products/stage1/losses.png"
    done(*distill(work, seeded, "--stage", "1"))
    before = plot.stat().st_mtime_ns
    done(*distill(work, seeded, "--stage", "1", "--overwrite"))
    assert plot.stat().st_mtime_ns > before
