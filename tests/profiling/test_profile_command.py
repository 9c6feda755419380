"""`mmmamba profile` as it is used."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ended import Command

from mmmamba_cli.cli.options import read_lengths
from mmmamba_cli.profiling import OutOfMemory, default_plan, profiler, read_profile
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, STATIC_TEACHER, TUNED
from mmmamba_cli.profiling.result import RooflinePart
from mmmamba_cli.profiling.roofline import measure_roofline

QUICK = ("--contexts", "16,32", "--repeats", 2)


@pytest.fixture(scope="module", autouse=True)
def rates_measured_once() -> Iterator[None]:
    """The first profile measures the rates of the device, which take more than a second."""
    with pytest.MonkeyPatch.context() as patch:
        rates: dict[torch.dtype, RooflinePart] = {}

        def measure(device: torch.device, dtype: torch.dtype, *rest: Any) -> RooflinePart:
            if dtype not in rates:
                rates[dtype] = measure_roofline(device, dtype, *rest)
            return rates[dtype]

        patch.setattr(profiler, "measure_roofline", measure)
        yield


@pytest.fixture
def plots() -> None:
    """The command draws its plots."""


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plots take most of the time of a small profile; tests of plots ask for `plots`."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(profiler, "render_plot", lambda profile, kind: None)


@pytest.mark.usefixtures("plots")
def test_a_run_its_teacher_and_its_products(
    mmmamba: Command, profiled_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(profiled_run, run)
    done = mmmamba("profile", "--run", run, *QUICK)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    heading = "context teacher as shipped teacher tuned seed hybrid-2"
    assert heading.split() in lines
    assert (
        "Compared: seed (0 of 8 layers attention), hybrid-2 (2 of 8 layers attention)" in done.out
    )
    assert "allowed 0.0001: green." in done.out
    assert "never distilled end to end: seed, hybrid-2; speed does not depend on it" in done.out
    assert "memory is counted, weights and cache" in done.out
    assert f"wrote {run / 'profile' / 'profile.png'}" in done.err
    found = read_profile(run / "profile" / "profile.json")
    manifest = json.loads((run / "products/seed/manifest.json").read_text())
    student = next(one for one in found.subjects if one.name == "seed")
    assert (student.content_hash, student.final) == (manifest["content_hash"], False)
    assert found.command.startswith("mmmamba profile --run")
    assert found.plan.contexts == (16, 32)


def test_json_is_the_file(mmmamba: Command, profiled_run: Path, tmp_path: Path) -> None:
    words = ["--run", profiled_run, "--from", "seed", "--no-teacher", "--no-prefill"]
    done = mmmamba("profile", *words, *QUICK, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((tmp_path / "profile.json").read_text())
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == ["seed"]
    assert {one.task for one in found.measurements} == {"decode"}
    assert not (profiled_run / "profile").exists()


@pytest.mark.parametrize("name", ["profile.json", "profile.png", "profile.svg"])
def test_only_a_profile_is_replaced(mmmamba: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    done = mmmamba("profile", "--random", "hovle-8m", *QUICK, "--out", tmp_path)
    assert done.code == 2 and f"holds {name} that mmmamba profile did not write" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_cannot_be_written_is_found_before_measuring(
    mmmamba: Command, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    done = mmmamba("profile", "--random", "hovle-8m", *QUICK, "--out", tmp_path / "out")
    assert done.code == 2 and "measure" not in done.err
    assert f"{tmp_path / 'out'} is not a folder (give another --out)" in done.err


def test_a_checkpoint_without_a_run(
    mmmamba: Command, hovle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mmmamba("profile", "--model", hovle_folder, *QUICK)
    assert done.code == 0, done.err
    assert "against no teacher" in done.out
    found = read_profile(tmp_path / "profile" / "profile.json")
    assert [(one.name, one.kind) for one in found.subjects] == [("hovle", "all attention")]


def test_a_checkpoint_beside_the_runs_teacher_and_a_product(
    mmmamba: Command, profiled_run: Path, hovle_folder: Path, tmp_path: Path
) -> None:
    words = ["--run", profiled_run, "--model", hovle_folder, "--out", tmp_path, "--no-prefill"]
    assert mmmamba("profile", *words, *QUICK, "--teacher").code == 0
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == [AS_SHIPPED, TUNED, "hovle"]
    assert mmmamba("profile", *words, *QUICK, "--from", "seed").code == 0
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == ["seed", "hovle"]
    moved = ["--from", "seed", "--teacher-path", profiled_run.parent / "hovle.ckpt"]
    assert mmmamba("profile", *words, *QUICK, *moved).code == 0
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == [AS_SHIPPED, TUNED, "seed", "hovle"]


def test_an_architecture_without_weights(mmmamba: Command, tmp_path: Path) -> None:
    words = ["--random", "hovle-8m", "--attn-layers", "0,4", "--no-prefill"]
    done = mmmamba("profile", *words, *QUICK, "--batch", 2, "--out", tmp_path)
    assert done.code == 0, done.err
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == [AS_SHIPPED, TUNED, "linear", "hybrid-4"]
    assert found.subjects[3].attention_layers == (0, 2, 4, 6)
    assert {one.weights for one in found.subjects} == {"random"}
    assert (found.dtype, found.plan.batch) == ("float32", 2)


def test_a_dtype(mmmamba: Command, tmp_path: Path) -> None:
    # One model: a CPU without AVX-512 or AMX computes bf16 slowly.
    words = ["--random", "hovle-8m", "--attn-layers", "0", "--no-teacher", "--no-prefill"]
    done = mmmamba("profile", *words, *QUICK, "--dtype", "bf16", "--out", tmp_path)
    assert done.code == 0, done.err
    found = read_profile(tmp_path / "profile.json")
    assert ([one.name for one in found.subjects], found.dtype) == (["linear"], "bfloat16")


def test_another_mixer(mmmamba: Command, tmp_path: Path) -> None:
    words = ["--random", "hovle-8m", "--attn-layers", "0", "--no-teacher", "--no-prefill"]
    words += ["--mixer", "gated_delta,kda"]
    done = mmmamba("profile", *words, *QUICK, "--out", tmp_path)
    assert done.code == 0, done.err
    reason = "Kimi delta attention has no fast decoding"
    assert f"Note: linear kda is decoded eagerly, with a static cache: {reason}." in done.out
    found = read_profile(tmp_path / "profile.json")
    ways = {one.name: (one.way, one.eager_reason) for one in found.subjects}
    assert ways == {"linear gated_delta": ("generator", None), "linear kda": ("eager", reason)}
    done = mmmamba("profile", "--mixer", "kda", "--out", tmp_path)
    assert done.code == 2 and "--mixer needs --random NAME" in done.err


def test_all_eager_and_a_static_teacher(mmmamba: Command, tmp_path: Path) -> None:
    words = ["--random", "hovle-8m", "--attn-layers", "0", "--no-prefill", "--eager"]
    done = mmmamba("profile", *words, *QUICK, "--out", tmp_path)
    assert done.code == 0, done.err
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == [AS_SHIPPED, STATIC_TEACHER, "linear"]
    assert {one.way for one in found.subjects} == {"eager"}
    assert "linear / static cache" in done.out
    assert "all eager" in found.compared


def test_int8_and_the_best_batch(mmmamba: Command, tmp_path: Path) -> None:
    words = ["--random", "hovle-8m", "--attn-layers", "0", "--no-prefill", "--int8"]
    done = mmmamba("profile", *words, *QUICK, "--throughput", 8, "--budget", 6, "--out", tmp_path)
    assert done.code == 0, done.err
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == [AS_SHIPPED, TUNED, "linear", "linear int8"]
    wide, narrow = found.subjects[2:]
    assert (wide.precision, narrow.precision) == (None, "int8")
    assert (narrow.weight_bytes or 0) < 0.4 * (wide.weight_bytes or 0)
    assert found.plan.throughput == (8,)
    assert {one.context for one in found.throughput} == {8}
    assert found.throughput[0].batch == 1
    assert "most tokens a second" in done.out


def test_defaults_suit_a_cpu_and_take_less_than_a_minute(mmmamba: Command, tmp_path: Path) -> None:
    plan = default_plan(torch.device("cpu"))
    assert (plan.contexts, plan.budget) == ((1024, 2048, 4096, 8192), 35)
    begin = time.thread_time()
    done = mmmamba("profile", "--random", "hovle-8m", "--no-prefill", "--out", tmp_path)
    assert done.code == 0, done.err
    assert time.thread_time() - begin < 60
    found = read_profile(tmp_path / "profile.json")
    assert (found.plan.contexts, found.plan.budget) == (plan.contexts, 35)
    assert all(one.median for one in found.measurements)


def test_over_budget_gives_a_warning(mmmamba: Command, tmp_path: Path) -> None:
    words = ["--random", "hovle-8m", "--contexts", "16,256k", "--budget", 3, "--no-teacher"]
    done = mmmamba("profile", *words, "--attn-layers", 0, "--repeats", 1, "--out", tmp_path)
    assert done.code == 0, done.err
    found = read_profile(tmp_path / "profile.json")
    assert [one.name for one in found.subjects] == ["linear"]
    last = found.find("linear", "prefill", 262144)
    assert last is not None
    assert last.status == "skipped: over budget"
    assert "over budget" in done.out
    assert "warning: --budget SECONDS allows more time" in done.err


def test_out_of_memory_is_a_row_and_exit_0(
    mmmamba: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmmamba_cli.profiling.eager_decoder import EagerDecoder

    fill = EagerDecoder.fill_random

    def full(self: EagerDecoder, batch: int, columns: int, rng: object) -> None:
        if columns > 20 and self.kind == "growing":
            raise OutOfMemory("no room")
        fill(self, batch, columns, rng)  # type: ignore[arg-type]

    monkeypatch.setattr(EagerDecoder, "fill_random", full)
    words = ["--random", "hovle-8m", "--no-prefill", "--out", tmp_path]
    done = mmmamba("profile", *words, "--contexts", "16,32,64", "--repeats", 1)
    assert done.code == 0, done.err
    found = read_profile(tmp_path / "profile.json")
    statuses = [found.find(AS_SHIPPED, "decode", n) for n in (16, 32, 64)]
    assert [one.status for one in statuses if one] == [
        "measured",
        "out of memory",
        "skipped: a shorter one was out of memory",
    ]
    row = next(line for line in done.out.splitlines() if line.lstrip().startswith("32 "))
    assert "out of memory" in row
    assert "teacher as shipped (next token at 32): out of memory (no room)" in done.err
    assert len([one for one in found.ratios if one.context == 32]) == 2


@pytest.mark.usefixtures("plots")
def test_without_matplotlib_the_pip_command_is_shown(
    mmmamba: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["--random", "hovle-8m", "--attn-layers", 0, "--no-teacher", "--no-prefill"]
    done = mmmamba("profile", *words, *QUICK, "--out", tmp_path)
    assert done.code == 0
    assert "pip install 'mmmamba[tracking]'" in done.err
    assert not (tmp_path / "profile.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--contexts", "1k,3x"], "--contexts: '3x' is no length (give numbers of tokens"),
        (["--contexts", "0"], "--contexts: '0' is no length"),
        (["--contexts", ""], "--contexts: '' is no length"),
        (["--throughput", "many"], "--throughput: 'many' is no length (give numbers of tokens"),
        (["--int8", "--eager"], "--int8 is decoded by mmmamba's own decoder, not eagerly"),
        (["--random", "hovle-2b"], "no architecture is called hovle-2b: give hovle-2.6b or hovle-"),
        (["--random", "hovle-8m", "--attn-layers", "9"], "is 9, must be from 0 to 8"),
        (["--random", "hovle-8m", "--attn-layers", "a"], "--attn-layers is 'a', expected numbers"),
        (["--attn-layers", "4"], "--attn-layers needs --random NAME"),
        (["--random", "hovle-8m", "--from", "seed"], "--random has its own teacher and students"),
        (["--from", "none"], "has no product 'none', it has: seed, hybrid-2"),
        (["--device", "tpu9"], "device 'tpu9' is not known"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--dtype", "fp7"], "dtype 'fp7' is not known"),
        (["--model", "nowhere"], "nowhere"),
        (["--teacher-path", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_sentences(
    mmmamba: Command, profiled_run: Path, words: list[str], sentence: str
) -> None:
    done = mmmamba("profile", "--run", profiled_run, *words)
    assert done.code == 2
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert not (profiled_run / "profile").exists()


def test_a_folder_that_is_not_a_run(mmmamba: Command, tmp_path: Path) -> None:
    done = mmmamba("profile", "--run", tmp_path / "none")
    assert done.code == 2
    assert "is not a run" in done.err


def test_lengths() -> None:
    assert read_lengths("8K, 512,1m,512") == (512, 8192, 2**20)
