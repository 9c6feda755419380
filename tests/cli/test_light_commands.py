"""Commands that read JSON and headers: neither torch nor transformers, and within a second."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from suite_tables import mme_rows, write_tsv

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers")
# What an idle machine needs for each is 0.2 to 0.5 s; others may keep this one busy, which costs
# wall-clock time, and less of the processor's.
CPU_SECONDS = 1.0
HELP_FACTOR = 2.5
# An import of these ends in ImportError, and says which command wanted it.
REFUSING = (
    "import sys\n"
    f"sys.modules.update(dict.fromkeys({HEAVY}))\n"
    "from mmmamba_cli.cli import main\n"
    "sys.argv[0] = 'mmmamba'\n"
    "main()\n"
)


def light(*words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process in which torch and transformers cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", REFUSING, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def processor_seconds(*words: object, times: int = 3) -> float:
    """Median of the time that a process computes."""
    taken = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime)
    return statistics.median(taken)


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Words of an evaluation of answers in a file."""
    folder = tmp_path_factory.mktemp("answers")
    rows = mme_rows()
    write_tsv(folder / "MME.tsv", rows)
    said = [{"index": row["index"], "prediction": row["answer"]} for row in rows]
    file = write_tsv(folder / "said.tsv", said)
    return ["eval", "--suite", "mme", "--predictions", file, "--data", folder, "--out", folder]


COMMANDS = {
    "help": ["--help"],
    "status": ["status", "--run", "{run}"],
    "status --json": ["status", "--run", "{run}", "--json"],
    "inspect product": ["inspect", "--run", "{run}"],
    "inspect shipped": ["inspect", "scenes-linear", "--context", "8k", "--dtype", "bf16"],
    "inspect --json": ["inspect", "scenes-hybrid", "--json"],
    "recipe list": ["recipe", "list"],
    "recipe show": ["recipe", "show", "mmmamba-linear", "--set", "mixer.rope=true"],
    "recipe validate": ["recipe", "validate", "mmmamba-linear", "--num-layers", "32"],
    "report": ["report", "--run", "{run}", "--out", "{folder}/report.html"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_needs_neither_torch_nor_transformers(name: str, student_run: Path, tmp_path: Path) -> None:
    words = [word.format(run=student_run, folder=tmp_path) for word in COMMANDS[name]]
    done = light(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_answers_in_a_file_are_scored_without_them(answered: list[object]) -> None:
    done = light(*answered)
    assert done.returncode == 0, done.stderr
    assert "text_translation" in done.stdout


@pytest.mark.parametrize("name", ["status", "inspect product", "inspect shipped", "recipe show"])
def test_takes_less_than_a_second(name: str, student_run: Path, tmp_path: Path) -> None:
    words = [word.format(run=student_run, folder=tmp_path) for word in COMMANDS[name]]
    assert processor_seconds("-m", "mmmamba_cli", *words) < CPU_SECONDS


def test_scoring_a_file_takes_less_than_a_second(answered: list[object]) -> None:
    assert processor_seconds("-m", "mmmamba_cli", *answered) < CPU_SECONDS


def test_help_takes_little_more_than_its_two_libraries() -> None:
    """`--help` against `import typer, rich`, in turns; the least of several is the steadiest."""
    ours, theirs = [], []
    for _ in range(7):
        theirs.append(processor_seconds("-c", "import typer, rich", times=1))
        ours.append(processor_seconds("-m", "mmmamba_cli", "--help", times=1))
    assert min(ours) <= HELP_FACTOR * min(theirs)


def test_a_package_that_defers_a_name_still_has_it() -> None:
    """Every public name of a room can be had from it, and a name it lacks is an AttributeError."""
    code = (
        "import importlib\n"
        "for room in ('checkpoint', 'distill', 'inspection', 'profiling', 'runs'):\n"
        "    module = importlib.import_module(f'mmmamba_cli.{room}')\n"
        "    assert not [n for n in module.__all__ if getattr(module, n, None) is None], room\n"
        "    try:\n        module.nothing\n"
        "    except AttributeError as error:\n        assert 'nothing' in str(error)\n"
        "    else:\n        raise AssertionError(room)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
