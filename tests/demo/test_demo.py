"""The demo: steps, lanes, folder and token agreement."""

from __future__ import annotations

import importlib
import io
import json
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ended import Command
from torch import Tensor
from typer.main import get_command

from mmmamba_cli.cli.app import app
from mmmamba_cli.data import IGNORE_INDEX, StepLoader, open_corpus
from mmmamba_cli.distill.kl_loss import shift_labels
from mmmamba_cli.errors import RunError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.reporting.run_contents import read_comparisons
from mmmamba_cli.runs import Run, open_processor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    sys.path.append(str(BENCHMARKS))
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def agreement(demo: ModuleType) -> ModuleType:
    return importlib.import_module("token_agreement")


def words_of(demo: ModuleType, lane: str) -> list[tuple[str, ...]]:
    return [step.words for step in demo.steps() if step.lane == lane]


def test_both_linear_students_are_trained_equally(demo: ModuleType) -> None:
    seeded, unseeded = words_of(demo, "seeded"), words_of(demo, "unseeded")
    swapped = [tuple("seeded" if w == "unseeded" else w for w in words) for words in unseeded]
    assert swapped[0] == (*seeded[0], *demo.SCRATCH, "--no-report")
    assert swapped[1] == seeded[1]
    assert seeded[1][0] == "distill"
    # The stages themselves: all that differs is the start, and that W_O may learn where it began
    # at random.
    sets = [demo.SCRATCH[i + 1] for i, word in enumerate(demo.SCRATCH) if word == "--set"]
    one, other = load_recipe("scenes-demo"), load_recipe("scenes-demo", sets)
    assert other.stages[2].learns != one.stages[2].learns
    assert other == one.model_copy(update={"stages": (*one.stages[:2], other.stages[2])})
    learns = {"learns": one.stages[2].learns}
    assert other.stages[2].model_copy(update=learns) == one.stages[2]


def test_lanes_use_separate_runs(demo: ModuleType) -> None:
    for lane in demo.LANES:
        found = words_of(demo, lane)
        assert found
        for words in found:
            assert words[words.index("--run") + 1] == lane
    lanes = [lane for lane, _ in groupby(step.lane for step in demo.steps())]
    # Drawn before both, profiled after both, when nothing else runs.
    assert lanes == [None, "seeded", "unseeded", None]
    assert [step.words[0] for step in demo.steps() if step.lane is None] == [
        "scenes",
        "scenes",
        "profile",
    ]


def test_every_step_is_an_existing_command(demo: ModuleType) -> None:
    for step in demo.steps():
        command: Any = get_command(app)
        words = list(step.words)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options, step.words
    kinds = {step.words[0] for step in demo.steps()}
    assert kinds == {"scenes", "seed", "distill", "hybridize", "eval", "profile"}


def test_step_numbers_include_comparison_and_report(demo: ModuleType) -> None:
    listed = list(demo.steps())
    numbers = [number for number, _ in demo.numbered(listed)]
    assert numbers[0] == f"[1/{len(listed) + 2}]"
    assert numbers[-1] == f"[{len(listed)}/{len(listed) + 2}]"


def test_finished_steps_are_skipped(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    performed: list[tuple[str, ...]] = []
    monkeypatch.setattr(demo, "perform", performed.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    steps = [
        demo.Step("one", ("first",), "there"),
        demo.Step("two", ("second",), "missing"),
        demo.Step("three", ("third",)),
    ]
    demo.work_through(demo.numbered(steps))
    assert performed == [("second",), ("third",)]
    said = capsys.readouterr().out
    assert "[1/5] one: done before" in said
    assert "[2/5] two\n$ mmmamba second\n" in said


def test_foreign_folder_is_not_touched(demo: ModuleType, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is there and no demo"):
            demo.prepare_folder(mine, overwrite)
    assert (mine / "thesis.txt").read_text() == "years"


def test_demo_resumes_or_starts_over(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    demo.prepare_folder(folder, False)
    (folder / "made").touch()
    demo.prepare_folder(folder, False)
    assert (folder / "made").exists()
    monkeypatch.setattr(demo, "LESSONS", demo.LESSONS + 1)
    with pytest.raises(RunError, match="another version of the demo"):
        demo.prepare_folder(folder, False)
    demo.prepare_folder(folder, True)
    assert not (folder / "made").exists()


def lane(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], text=True)


def test_successful_lanes(demo: ModuleType) -> None:
    assert demo.wait_for([lane("pass"), lane("import time; time.sleep(0.3)")]) == [0, 0]


def test_failed_lane_stops_the_other(demo: ModuleType) -> None:
    codes = demo.wait_for([lane("import time; time.sleep(600)"), lane("raise SystemExit(7)")])
    assert codes[0] == 7
    assert codes[1] != 0


def test_exit_code_of_the_failed_lane(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "lanes.py"
    script.write_text(
        "import sys, time\n"
        "if 'seeded' in sys.argv:\n"
        "    time.sleep(600)\n"
        "print('no luck', flush=True)\n"
        "sys.exit(5)\n"
    )
    monkeypatch.setattr(demo, "__file__", str(script))
    with pytest.raises(SystemExit) as ended:
        demo.side_by_side()
    assert ended.value.code == 5


def test_lanes_share_threads_and_prefix_lines(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "lanes.py"
    script.write_text(
        "import os, sys\n"
        "lane = sys.argv[sys.argv.index('--lane') + 1]\n"
        "print(lane, 'has', os.environ['OMP_NUM_THREADS'])\n"
        "print('a warning', file=sys.stderr)\n"
    )
    monkeypatch.setattr(demo, "__file__", str(script))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    demo.side_by_side()
    said = capsys.readouterr().out.splitlines()
    assert "  seeded | seeded has 3" in said
    assert "unseeded | unseeded has 3" in said
    assert said.count("  seeded | a warning") == said.count("unseeded | a warning") == 1


def test_empty_lines_are_dropped(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    demo.pass_on("seeded", io.StringIO("one\n\n  \ntwo\n"))
    assert capsys.readouterr().out == "  seeded | one\n  seeded | two\n"


@pytest.fixture
def made(mmmamba: Command, tmp_path: Path) -> Path:
    """Lessons, and an untrained student of the shipped teacher in a run."""
    size = ("--short", "--pictures", 1, "--lessons", 5)
    assert mmmamba("scenes", "build", "--out", tmp_path / "held-out", *size).code == 0
    words = ("scenes-teacher", "--run", tmp_path / "seeded", "--dtype", "fp32", "--no-report")
    assert mmmamba("seed", *words, "--recipe", "scenes-demo").code == 0
    return tmp_path


def test_shares_by_lesson(agreement: ModuleType, made: Path) -> None:
    run = Run(made / "seeded")
    teacher, student = run.open_teacher(), run.open_product("seed")
    lessons = made / "held-out" / "lessons.jsonl"
    found = agreement.by_lesson(teacher, {"itself": teacher, "seed": student}, lessons)
    told = [json.loads(line) for line in lessons.read_text().splitlines()]
    names = [line["id"].rpartition("-")[0] for line in told]
    assert len(told) > 8 > len(set(names)) == 5
    # The teacher is like itself, whatever stands beside a conversation in its batch.
    for name in agreement.COMPARISONS:
        for right, tokens in found["itself"][name]:
            assert right == pytest.approx(tokens, rel=1e-5)
    models = [
        agreement.load_model(one.path, dtype="fp32", frozen=True, checkpoint=one)
        for one in (teacher, student)
    ]
    alone = one_by_one(models, teacher, lessons, names)
    for name, shares in alone.items():
        assert [tokens for _, tokens in found["seed"][name]] == [tokens for _, tokens in shares]
        ours = [right for right, _ in found["seed"][name]]
        assert ours == pytest.approx([right for right, _ in shares], rel=1e-3)
    # One half of something is neither all nor nothing.
    assert 0 < sum(right for right, _ in alone["overlap"]) < sum(n for _, n in alone["overlap"])


@torch.no_grad()
def one_by_one(
    models: list[HolisticVLM], teacher: Any, lessons: Path, names: list[str]
) -> dict[str, list[tuple[float, int]]]:
    """The same with nothing batched, by another formula: half of the L1 distance is not shared."""
    processor = open_processor(teacher)
    assert processor is not None
    loader = StepLoader(
        open_corpus(lessons), processor, batch_size=1, max_length=1024, max_tiles=1, shuffle=False
    )
    sums: dict[str, Tensor] = {name: torch.zeros(3) for name in names}
    for name, step in zip(names, loader.steps(0, len(names)), strict=True):
        batch = step.micro_batches[0]
        scored = shift_labels(batch) != IGNORE_INDEX
        prompt = models[0].model.prepare(batch.input_ids, batch.pixel_values, None, None)
        p, q = (
            model.lm_head(model.model.forward_prepared(prompt)[scored]).softmax(-1)
            for model in models
        )
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        shared = (1 - (p - q).abs().sum(-1) / 2).sum()
        sums[name] += torch.tensor([float(same), float(shared), float(scored.sum())])
    rows = [[float(value) for value in row] for row in sums.values()]
    return {
        "agreement": [(same, int(tokens)) for same, _, tokens in rows],
        "overlap": [(shared, int(tokens)) for _, shared, tokens in rows],
    }


def test_report_reads_the_comparison(
    demo: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made / "unseeded").symlink_to(made / "seeded")
    measurements = importlib.import_module("demo_measurements")
    monkeypatch.setattr(measurements, "LINEAR", "seed")
    monkeypatch.setattr(measurements, "HYBRID", "seed ")
    monkeypatch.setattr(measurements, "NUM_CONVERSATIONS", 6)
    monkeypatch.setattr(Run, "open_product", lambda self, name, real=Run.open_product: real(
        self, name.strip()))  # fmt: skip
    assert not demo.is_measured(made)
    demo.measure(made)
    assert demo.is_measured(made)
    remarks: list[str] = []
    found = read_comparisons(made / "seeded", remarks)
    assert remarks == []
    metrics = [
        metric for _, metric in importlib.import_module("token_agreement").COMPARISONS.values()
    ]
    assert [one.metric for one in found] == metrics
    for one in found:
        assert one.units == 5
        assert one.compare == [("seed", "seed (unseeded)")]
        assert one.models["seed"] == one.models["seed (unseeded)"]
        assert all(0 <= right <= tokens for right, tokens in one.models["seed"])
    measured = json.loads((made / "seeded" / "fidelity.json").read_text())
    assert measured["inputs"] == "6 held-out conversations"
    (seed,) = measured["products"].values()
    assert seed["content_hash"] == Run(made / "seeded").product("seed").content_hash
    assert [layer["layer"] for layer in seed["layers"]] == list(range(8))
    # A seeded mixer is neither the attention nor unrelated to it.
    assert all(0 < layer["cosine"] < 1 for layer in seed["layers"])


def test_page_names_the_commands(demo: ModuleType) -> None:
    page = (BENCHMARKS.parent / "docs" / "demo.md").read_text(encoding="utf-8")
    for step in demo.steps():
        named = " ".join(step.words[: 2 if step.words[0] == "scenes" else 1])
        assert f"mmmamba {named}" in page, shlex.join(step.words)
