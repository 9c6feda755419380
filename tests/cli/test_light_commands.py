"""Commands that read only JSON and headers: no torch, no transformers, less than a second."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from suite_tables import mme_rows, write_tsv

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers")
# An idle machine needs 0.2 to 0.5 s. CPU time is measured, which depends less on other load than
# wall-clock time.
CPU_SECONDS = 1.0
# `--help` of an application without contents needs 0.17 s of CPU time on that machine. A machine on
# which it takes longer is slow, and so is a command.
BARE_FACTOR = 6
# A measurement is repeated if other load made it too long.
ATTEMPTS = 10
# `--help` takes 1.1 times as long as that of the bare application on an idle machine.
HELP_FACTOR = 1.5
BARE_APPLICATION = (
    "import typer\n"
    "app = typer.Typer(callback=lambda: None)\n"
    "for number in range(17):\n"
    "    app.command(f'command-{number}', help='One line of help.')(lambda: None)\n"
    "app()\n"
)
# Importing one of HEAVY raises an ImportError that names the importing module.
REFUSING = (
    "import sys\n"
    f"sys.modules.update(dict.fromkeys({HEAVY}))\n"
    "from mmmamba_cli.cli import main\n"
    "sys.argv[0] = 'mmmamba'\n"
    "main()\n"
)


def light(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that cannot import torch and transformers."""
    return subprocess.run(
        [sys.executable, "-c", REFUSING, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


def processor_seconds(*words: object) -> float:
    """CPU time of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime


def bare_seconds() -> float:
    return processor_seconds("-c", BARE_APPLICATION, "--help")


def takes_less_than_a_second(*words: object) -> bool:
    """Whether one of several processes does; on a slow machine, less than BARE_FACTOR allows."""
    for _ in range(ATTEMPTS):
        taken = processor_seconds("-m", "mmmamba_cli", *words)
        if taken < CPU_SECONDS or taken < BARE_FACTOR * bare_seconds():
            return True
    return False


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Arguments that score a file of answers."""
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
    "ablate --dry-run": ["ablate", "benchmarks/plans/smoke.yaml", "--dry-run"],
    "report": ["report", "--run", "{run}", "--out", "{folder}/report.html"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_needs_neither_torch_nor_transformers(name: str, student_run: Path, tmp_path: Path) -> None:
    words = [word.format(run=student_run, folder=tmp_path) for word in COMMANDS[name]]
    done = light(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_scoring_a_file_needs_neither(answered: list[object]) -> None:
    done = light(*answered)
    assert done.returncode == 0, done.stderr
    assert "text_translation" in done.stdout


@pytest.mark.parametrize("name", ["status", "inspect product", "inspect shipped", "recipe show"])
def test_takes_less_than_a_second(name: str, student_run: Path, tmp_path: Path) -> None:
    words = [word.format(run=student_run, folder=tmp_path) for word in COMMANDS[name]]
    assert takes_less_than_a_second(*words)


def test_scoring_a_file_takes_less_than_a_second(answered: list[object]) -> None:
    assert takes_less_than_a_second(*answered)


def test_help_takes_about_as_long_as_that_of_a_bare_application() -> None:
    """Alternate both, at least three times, until the minima agree; they are the most stable."""
    ours, theirs = [], []
    for attempt in range(ATTEMPTS):
        theirs.append(bare_seconds())
        ours.append(processor_seconds("-m", "mmmamba_cli", "--help"))
        if attempt >= 2 and min(ours) <= HELP_FACTOR * min(theirs):
            return
    pytest.fail(f"{min(ours):.3f} s of CPU time, and {min(theirs):.3f} s of a bare application")


def test_lazy_attributes_of_packages() -> None:
    """Every name in `__all__` resolves, and an unknown name is an AttributeError."""
    for room in ("checkpoint", "distill", "inspection", "profiling", "runs"):
        module = importlib.import_module(f"mmmamba_cli.{room}")
        for name in module.__all__:
            try:
                assert module.__getattr__(name) is not None
            except AttributeError:
                # A name that the package imports at once.
                assert vars(module).get(name) is not None, (room, name)
        with pytest.raises(AttributeError, match="nothing"):
            getattr(module, "nothing")  # noqa: B009
