"""Stages that are repeated, interrupted and resumed; changed settings and data."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kill_points
import pytest
from conversations import write_conversations
from PIL import Image
from preloaded_process import PreloadedProcess
from test_distill import distill, done, mmmamba, refused, same, weights

from mmmamba_cli.distill.training_state import StateFolder
from mmmamba_cli.runs import Run

# Fields of a metrics row that differ between runs: speed, and GPU memory, which is lower after
# resuming.
MEASURED = {"tokens_per_second", "memory_gib"}
# Number of kills in the long-running test; use MMMAMBA_KILLS=20 for the full test.
KILLS = max(4, int(os.environ.get("MMMAMBA_KILLS", "4")))
STAGE = ("--stage", "1")
OTHER = ("--set", "stages.stage1.lr=2e-3")
# So high that the held-out loss rises again, and the best student is not the last one.
TOO_HIGH = ("--set", "stages.stage1.lr=1.0", "--set", "stages.stage1.evaluate_every=1")


# The most critical places for a kill: position in the command, event, part of the path, and number
# of the matching operation. The four most critical come first.
PLACES = (
    (1, "open", "/training/stage1/metrics.jsonl", 1),
    (3, "open", "/training/stage1/.step-00000004", 1),
    (7, "open", "/products/.stage1.partial", 6),
    (8, "os.rename", "/products/.stage1.partial", 1),
    (2, "os.mkdir", "/training/stage1/.step-00000002", 1),
    (4, "os.rename", "/training/stage1/.step-00000004", 1),
    (5, "open", "/products/.stage1-best.partial", 6),
    (6, "os.rename", "/products/.stage1-best.partial", 1),
    (9, "os.rename", "/run.json", 1),
    (10, "os.rename", "/overwrite.json", 1),
    (11, "os.rename", "/training/.stage1.removed", 1),
    (12, "os.rename", "/training/.stage2.partial", 1),
    (13, "open", "/training/stage2/.step-00000002", 1),
    (14, "open", "/products/.stage2.partial", 3),
    (15, "os.rename", "/products/.stage2.partial", 1),
    (16, "open", "/products/.hybrid-1.partial", 3),
    (17, "os.rename", "/products/.hybrid-1.partial", 1),
    (18, "open", "/training/hybrid-1-stage3/.step-00000004", 1),
    (19, "open", "/products/.hybrid-1-stage3.partial", 8),
    (20, "os.rename", "/products/.hybrid-1-stage3.partial", 1),
)


class Interrupt(BaseException):
    """Stands for a kill: the package must not catch it."""


@contextmanager
def interrupted_after(step: int, stage: str = "stage1") -> Iterator[None]:
    """End the command once the state of `step` of a stage is written."""
    original = StateFolder.save

    def save(self: StateFolder, name: str, *rest: Any) -> None:
        original(self, name, *rest)
        if (self.folder.name, name) == (stage, f"step-{step:08d}"):
            raise Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFolder, "save", save)
        yield


def interrupt(
    work: Path, seeded: Path, *more: object, step: int = 2, stage: str = "stage1"
) -> None:
    with interrupted_after(step, stage), pytest.raises(Interrupt):
        mmmamba(*distill(work, seeded, *more))


def metrics(work: Path, name: str) -> list[dict[str, Any]]:
    """The metrics rows of a product without measured fields."""
    rows = [json.loads(x) for x in (work / f"run/products/{name}/metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.fixture(scope="module")
def finished_once(seeded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(seeded / "run", folder / "run")
    done(*distill(folder, seeded, *STAGE))
    return folder


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A run whose stage 1 is finished."""
    return shutil.copytree(finished_once, tmp_path / "work")


def test_an_interrupted_overwrite_resumes(finished: Path, seeded: Path) -> None:
    undisturbed = finished.parent / "undisturbed"
    shutil.copytree(finished, undisturbed)
    repeat = (*STAGE, *OTHER, "--overwrite")
    done(*distill(undisturbed, seeded, *repeat))
    old = Run(finished / "run").product("stage1")
    interrupt(finished, seeded, *repeat)
    run = Run(finished / "run")
    assert run.product("stage1") == old
    run.verify_product("stage1")
    message = refused(*distill(finished, seeded, *STAGE, *OTHER))
    assert "stage1 is finished, and a repetition of it with --overwrite was interrupted after" in (
        message
    )
    assert "step 2 of 4" in message
    assert "go on with --overwrite" in message
    output = done(*distill(finished, seeded, *repeat)).output
    assert "resuming after step 2" in output
    assert same(weights(finished, "stage1"), weights(undisturbed, "stage1"))
    assert metrics(finished, "stage1") == metrics(undisturbed, "stage1")
    assert run.product("stage1").created > old.created
    assert not list((finished / "run/training").iterdir())


def test_overwrite_resumes_a_first_training_too(work: Path, seeded: Path) -> None:
    interrupt(work, seeded, *STAGE)
    assert "resuming after step 2" in done(*distill(work, seeded, *STAGE, "--overwrite")).output


def test_restart_begins_at_step_1(finished: Path, seeded: Path) -> None:
    interrupt(finished, seeded, *STAGE, "--overwrite")
    output = done(*distill(finished, seeded, *STAGE, "--restart")).output
    assert "resuming" not in output
    assert [row["step"] for row in metrics(finished, "stage1")] == [1, 2, 3, 4]
    shutil.rmtree(finished / "run/products/stage1")
    interrupt(finished, seeded, *STAGE, "--from", "seed")
    begun = ("--from", "seed", "--restart")
    assert "resuming" not in done(*distill(finished, seeded, *STAGE, *begun)).output


def test_overwrite_of_other_settings_begins_at_step_1(work: Path, seeded: Path) -> None:
    interrupt(work, seeded, *STAGE)
    output = done(*distill(work, seeded, *STAGE, *OTHER, "--overwrite")).output
    assert "beginning at step 1: the state after step 2 was made with other settings" in output
    assert "stages.stage1.lr: 0.001 -> 0.002" in output
    assert "resuming" not in output


def test_an_overwrite_killed_before_its_first_state_costs_nothing(
    finished: Path, seeded: Path
) -> None:
    before = metrics(finished, "stage1")
    more = (*STAGE, "--overwrite", "--set", "stages.stage1.save_every=3")
    with pytest.MonkeyPatch.context() as patch:

        def save(self: StateFolder, name: str, *rest: Any) -> None:
            raise Interrupt

        patch.setattr(StateFolder, "save", save)
        with pytest.raises(Interrupt):
            mmmamba(*distill(finished, seeded, *more))
    assert (finished / "run/training/stage1/metrics.jsonl").stat().st_size
    assert "is finished already" in done(*distill(finished, seeded, *STAGE)).output
    assert metrics(finished, "stage1") == before
    assert not (finished / "run/training/stage1").exists()


def test_a_full_disk_at_the_beginning_costs_nothing(finished: Path, seeded: Path) -> None:
    """A repetition that could not begin does not count as finished."""
    words = distill(finished, seeded, *STAGE, "--overwrite")
    before, sync = Run(finished / "run").product("stage1"), os.fsync

    def fill(descriptor: int) -> None:
        if "attempt.json" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        assert mmmamba(*words).exit_code
    assert not (finished / "run/training/stage1").exists()
    done(*words)
    assert Run(finished / "run").product("stage1").created > before.created


def test_a_requeued_overwrite_of_several_stages_ends(work: Path, seeded: Path) -> None:
    stages = ("--stage", "1,2")
    done(*distill(work, seeded, *stages))
    repeat = (*stages, "--overwrite", "--set", "stages.stage1.lr=2e-3")
    interrupt(work, seeded, *repeat, stage="stage2")
    first = Run(work / "run").product("stage1")
    output = done(*distill(work, seeded, *repeat)).output
    assert "stage1 is finished already" in output
    assert Run(work / "run").product("stage1") == first
    assert Run(work / "run").record.current == "stage2"
    # The command finished; run again, it repeats all stages.
    done(*distill(work, seeded, *repeat))
    assert Run(work / "run").product("stage1").created > first.created


def test_the_best_student_of_a_replaced_stage_is_removed(work: Path, seeded: Path) -> None:
    held_out = ("--held-out", seeded / "held_out.jsonl")
    done(*distill(work, seeded, *STAGE, *held_out, *TOO_HIGH))
    run = Run(work / "run")
    assert "stage1-best" in run.products()
    lower = ("--set", "stages.stage1.lr=1e-3", "--overwrite")
    output = done(*distill(work, seeded, *STAGE, *held_out, *lower)).output
    assert run.product("stage1").metrics["best_step"] == 4
    assert "stage1-best" not in run.products()
    assert "removed stage1-best" in output


def test_foreign_files_in_a_product_are_noticed_before_training(
    finished: Path, seeded: Path
) -> None:
    (finished / "run/products/stage1/mine.txt").write_text("mine")
    message = refused(*distill(finished, seeded, *STAGE, "--overwrite"))
    assert "did not write: mine.txt" in message
    assert not (finished / "run/training/stage1").exists()


def test_a_finished_stage_of_other_settings_is_refused(finished: Path, seeded: Path) -> None:
    message = refused(*distill(finished, seeded, *STAGE, *OTHER))
    assert "stage1 is finished, and was made with other settings" in message
    assert "stages.stage1.lr: 0.001 -> 0.002" in message
    assert "--overwrite" in message
    # Settings without effect on the result and the path of the data may differ.
    workers = ("--set", "data.workers=1", "--set", "stages.stage1.accumulation=2")
    done(*distill(finished, seeded, *STAGE, *workers))
    moved = finished.parent / "moved"
    shutil.copytree(seeded, moved, ignore=shutil.ignore_patterns("run"))
    done(*distill(finished, moved, *STAGE))


def test_data_that_changed_is_noticed(work: Path, seeded: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(seeded, own, ignore=shutil.ignore_patterns("run"))
    interrupt(work, own, *STAGE)
    picture = own / "images/train-3.png"
    good = picture.read_bytes()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(picture)
    message = refused(*distill(work, own, *STAGE))
    assert "pictures of data.train" in message
    assert "have changed" in message
    assert "conversations" not in message
    picture.write_bytes(good)
    file = own / "train.jsonl"
    text = file.read_text()
    file.write_text(text.replace("What", "That", 1))
    assert "conversations of data.train" in refused(*distill(work, own, *STAGE))
    done(*distill(work, own, *STAGE, "--force"))
    # The finished stage was made with the current data.
    done(*distill(work, own, *STAGE))
    file.write_text(text)
    assert "conversations of data.train" in refused(*distill(work, own, *STAGE))


def test_other_held_out_data_behind_the_same_path(work: Path, seeded: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(seeded, own, ignore=shutil.ignore_patterns("run"))
    more = (*STAGE, "--held-out", own / "held_out.jsonl")
    interrupt(work, own, *more)
    state = work / "run/training/stage1/step-00000002/state.json"
    record = json.loads(state.read_text())
    record["progress"]["best_loss"] = -1.0
    state.write_text(json.dumps(record))
    write_conversations(own, 5, 7, "held_out")
    done(*distill(work, own, *more))
    assert Run(work / "run").product("stage1").metrics["best_loss"] > 0


def killed(work: Path, words: tuple[object, ...], places: list[Any]) -> list[dict[str, Any]]:
    """The report of `kill_points.py` for each start of a command."""
    settings = {"words": [*map(str, words)], "folder": str(work / "run"), "kills": places}
    output, report = work / "output", work / "report"
    process = PreloadedProcess(kill_points.run, [json.dumps(settings), str(report)], output)
    assert process.wait() == 0, process.text()
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert found, process.text()
    assert found[-1].get("exit") == 0, (found, process.text())
    return found


def test_kills_while_overwriting_give_the_same_bits(work: Path, seeded: Path) -> None:
    """SIGKILL at the most critical and at random places, always with the same command.

    While writing a state or a product, between the two renames that replace a product, before the
    first state, and while updating `attempt.json`, `overwrite.json` and `run.json`.
    """
    more = ("--held-out", seeded / "held_out.jsonl", "--stage", "1,2,3")
    done(*distill(work, seeded, *more))
    whole = work.parent / "whole"
    shutil.copytree(work, whole)
    repeat = (*more, "--overwrite", *TOO_HIGH)
    (undisturbed,) = killed(whole, distill(whole, seeded, *repeat), [])
    # In the order of the command, so that each place is reached from the one before.
    places = sorted(PLACES[:KILLS], key=lambda place: place[0])
    rng = random.Random(KILLS)
    most = undisturbed["operations"] // 10
    numbers = [rng.randint(1, most) for _ in range(KILLS - len(places))]
    starts = killed(
        work, distill(work, seeded, *repeat), [*numbers, *(list(x[1:]) for x in places)]
    )
    print("\n".join(map(str, starts)))
    assert len(starts) == KILLS + 1, starts
    one, two = Run(work / "run"), Run(whole / "run")
    products = one.products()
    assert "stage1-best" in products
    assert products.keys() == two.products().keys()
    assert one.record.current == two.record.current
    for name, product in products.items():
        one.verify_product(name)
        assert product.content_hash == two.product(name).content_hash, name
        if product.made_by == "distill" and not name.endswith("-best"):
            assert metrics(work, name) == metrics(whole, name), name
    assert not list((work / "run/training").iterdir())
    assert not list((work / "run").rglob(".*.partial-*")) + list((work / "run").rglob(".*.old-*"))
