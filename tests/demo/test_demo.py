"""The demo: steps, folder, token agreement and the report."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.main import get_command
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.data import IGNORE_INDEX, StepLoader, open_corpus
from mmmamba_cli.distill.kl_loss import shift_labels
from mmmamba_cli.errors import RunError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.reporting.measured_results import read_measured_results
from mmmamba_cli.reporting.run_contents import read_comparisons
from mmmamba_cli.runs import Run, open_processor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    sys.path.append(str(BENCHMARKS))
    return importlib.import_module("demo")


@pytest.fixture(scope="module")
def steps(demo: ModuleType) -> ModuleType:
    return importlib.import_module("demo_steps")


@pytest.fixture(scope="module")
def lanes(demo: ModuleType) -> ModuleType:
    return importlib.import_module("demo_lanes")


@pytest.fixture(scope="module")
def agreement(demo: ModuleType) -> ModuleType:
    return importlib.import_module("token_agreement")


def words_of(steps: ModuleType, lane: str) -> list[tuple[str, ...]]:
    return [step.words for step in steps.steps(steps.Sizes()) if step.lane == lane]


def test_both_linear_students_are_trained_equally(steps: ModuleType) -> None:
    seeded, unseeded = words_of(steps, "seeded"), words_of(steps, "unseeded")
    swapped = [tuple("seeded" if w == "unseeded" else w for w in words) for words in unseeded]
    assert swapped[0] == (*seeded[0], *steps.SCRATCH, "--no-report")
    assert swapped[1] == seeded[1]
    assert seeded[1][0] == "distill"
    # The stages themselves: all that differs is the start, and that W_O may learn where it began
    # at random.
    sets = [steps.SCRATCH[i + 1] for i, word in enumerate(steps.SCRATCH) if word == "--set"]
    one, other = load_recipe("scenes-demo"), load_recipe("scenes-demo", sets)
    assert other.stages[2].learns != one.stages[2].learns
    assert other == one.model_copy(update={"stages": (*one.stages[:2], other.stages[2])})
    learns = {"learns": one.stages[2].learns}
    assert other.stages[2].model_copy(update=learns) == one.stages[2]


def test_lanes_use_separate_runs(steps: ModuleType) -> None:
    assert steps.LANE_GROUPS == (("drawing",), ("seeded", "unseeded"), ("measuring",))
    for lane in ("seeded", "unseeded"):
        found = words_of(steps, lane)
        assert found
        for words in found:
            assert words[words.index("--run") + 1] == lane
    # Drawn before both, profiled after both, when nothing else runs.
    lanes = [lane for lane, _ in groupby(step.lane for step in steps.steps(steps.Sizes()))]
    assert lanes == ["drawing", "seeded", "unseeded", "measuring"]
    assert [words[0] for words in words_of(steps, "drawing")] == ["scenes", "scenes"]
    assert [words[0] for words in words_of(steps, "measuring")] == ["profile", "compare", "report"]


@pytest.mark.parametrize("share", [None, 0.5, 0.1])
def test_every_step_is_an_existing_command(steps: ModuleType, share: float | None) -> None:
    sizes = steps.Sizes() if share is None else steps.Sizes.reduced(share)
    listed = [step for step in steps.steps(sizes) if step.words != (steps.COMPARE,)]
    whole: Any = get_command(app)
    for step in listed:
        command = whole
        words = list(step.words)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options, step.words
    kinds = {step.words[0] for step in listed}
    assert kinds == {"scenes", "seed", "distill", "hybridize", "eval", "profile", "report"}


def test_default_sizes_are_those_of_recipe_and_suite(steps: ModuleType) -> None:
    """Sizes that change nothing add no option, so that the commands are those of before."""
    full = steps.Sizes()
    assert tuple(stage.steps for stage in load_recipe("scenes-demo").stages) == full.stage_steps
    assert full.stage_settings() == ()
    # Per picture: 6 questions in each of 3 splits, 2 in each of the 5 other categories.
    assert full.questions == full.pictures * (3 * 6 + 5 * 2)
    assert not any("--limit" in step.words for step in steps.steps(full))
    settings = steps.Sizes.reduced(0.5).stage_settings()
    found = load_recipe("scenes-demo", [word for word in settings if word != "--set"])
    assert [stage.steps for stage in found.stages] == [8, 12, 24]


def test_finished_steps_are_skipped(
    lanes: ModuleType,
    steps: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    performed: list[tuple[str, ...]] = []
    monkeypatch.setattr(lanes, "perform", performed.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    lanes.work_through(
        {
            1: steps.Step("one", ("first",), "seeded", "there"),
            2: steps.Step("two", ("second",), "seeded", "missing"),
            5: steps.Step("three", ("third",), "seeded"),
        }
    )
    assert performed == [("second",), ("third",)]
    events = [
        json.loads(line.lstrip(lanes.RECORD)) for line in capsys.readouterr().out.split("\n")[:-1]
    ]
    assert events == [
        {"event": event, "step": number} for number in (2, 5) for event in ("begin", "end")
    ]


def test_foreign_folder_is_not_touched(demo: ModuleType, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is not the folder of a demo"):
            demo.prepare_folder(mine, overwrite)
    assert (mine / "thesis.txt").read_text() == "years"


def test_demo_resumes_or_starts_over(demo: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert demo.prepare_folder(folder, False) == demo.Sizes()
    # Folders of before --minutes have this marker.
    text = '{"format": 2, "recipe": "scenes-demo", "lessons": 160, "pictures": 8}'
    assert (folder / "demo.json").read_text() == text
    (folder / "made").touch()
    demo.prepare_folder(folder, False)
    assert (folder / "made").exists()
    (folder / "demo.json").write_text(text.replace("160", "161"))
    with pytest.raises(RunError, match="another version of the demo"):
        demo.prepare_folder(folder, False)
    demo.prepare_folder(folder, True)
    assert not (folder / "made").exists()


def test_resumed_demo_keeps_its_sizes(demo: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    sizes = demo.prepare_folder(folder, False, minutes=2, slowdown=3.0)
    assert sizes.stage_steps < demo.Sizes().stage_steps
    # The machine is idle now.
    assert demo.prepare_folder(folder, False, minutes=2, slowdown=1.0) == sizes
    assert demo.prepare_folder(folder, False) == sizes
    with pytest.raises(RunError, match="was begun with --minutes 2, not with --minutes 3"):
        demo.prepare_folder(folder, False, minutes=3, slowdown=3.0)
    full = tmp_path / "full"
    demo.prepare_folder(full, False)
    with pytest.raises(RunError, match="was begun with all work, not with --minutes 3"):
        demo.prepare_folder(full, False, minutes=3, slowdown=3.0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lessons, and an untrained student of the shipped teacher in a run."""
    folder = tmp_path_factory.mktemp("built")
    size = ("--short", "--pictures", "1", "--lessons", "5")
    seed = ("scenes-teacher", "--dtype", "fp32", "--no-report", "--recipe", "scenes-demo")
    for words in (
        ("scenes", "build", "--out", str(folder / "held-out"), *size),
        ("seed", "--run", str(folder / "seeded"), *seed),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def made(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "made")
    return tmp_path / "made"


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
    assert not measurements.is_measured(made)
    measurements.measure(made)
    assert measurements.is_measured(made)
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
    # An untrained mixer is not the attention it replaces.
    assert all(abs(layer["cosine"]) < 0.99 for layer in seed["layers"]), seed["layers"]


def test_report_reads_committed_results(steps: ModuleType) -> None:
    *_, last = steps.steps(steps.Sizes())
    files = [Path(last.words[i + 1]) for i, word in enumerate(last.words) if word == "--results"]
    found = read_measured_results(files)
    assert len(found.scores) == len(found.profiles) == 1
    names = {one.model.name for one in found.scores[0][1].results}
    assert {"scenes-linear", "scenes-hybrid"} <= names


def test_note_counts_the_conversations_of_training(steps: ModuleType) -> None:
    batches = [stage.batch_size for stage in load_recipe("scenes-demo").stages]
    for sizes in (steps.Sizes(), steps.Sizes.reduced(0.1)):
        seen = sum(n * batch for n, batch in zip(sizes.stage_steps, batches, strict=True))
        assert f" {seen:,} short conversations" in steps.note(sizes)
    (small,) = [f"{round(1_180_800 / seen, -3):,.0f}"]
    assert f"1,180,800, about {small} times as many" in steps.note(sizes)


def test_page_names_the_commands(steps: ModuleType) -> None:
    page = (BENCHMARKS.parent / "docs" / "demo.md").read_text(encoding="utf-8")
    for step in steps.steps(steps.Sizes()):
        named = " ".join(step.words[: 2 if step.words[0] == "scenes" else 1])
        if step.words != (steps.COMPARE,):
            assert f"mmmamba {named}" in page, shlex.join(step.words)
