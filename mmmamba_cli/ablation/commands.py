"""Command lines of mmmamba: those that a cell runs, and those that do by hand what it does."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmmamba_cli.ablation.cells import Cell
from mmmamba_cli.ablation.plan import LIKELIHOOD, WORK, Plan
from mmmamba_cli.errors import RunError

# Seconds between looks at a command that runs.
POLL_SECONDS = 0.2


class CommandStopped(Exception):
    """A command was asked to save and stop, and did."""


def run_mmmamba(words: Sequence[str], log: Path, should_stop: Callable[[], bool]) -> None:
    """Run a command of mmmamba in a process of its own; its output is appended to `log`.

    Raises:
        CommandStopped: `should_stop` returned True; the command was asked to save and stop.
        RunError: the command failed; the message has its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as handle:
        process = subprocess.Popen(  # noqa: S603  words of the plan, without a shell
            [sys.executable, "-m", "mmmamba_cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        stopping = False
        while process.poll() is None:
            if should_stop() and not stopping:
                stopping = True
                process.terminate()
            time.sleep(POLL_SECONDS)
    if process.returncode == 0:
        return
    if stopping:
        raise CommandStopped
    lines = log.read_text(encoding="utf-8-sig", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it wrote nothing"
    raise RunError(
        f"mmmamba {shlex.join(words)} ended with exit code {process.returncode}: {last}",
        f"its output is in {log}",
    )


def fill_placeholders(command: str, places: Mapping[str, str]) -> list[str]:
    """The words of a command with its placeholders replaced."""
    words = shlex.split(command)
    for name, value in places.items():
        words = [word.replace(name, value) for word in words]
    return words


def commands_of(plan: Plan, cell: Cell) -> list[str]:
    """The commands that do by hand what a cell does; RUN and RECIPE stand for its files."""
    if cell.recipe is None:
        return _eval_commands(cell, f"--model {Path(plan.teacher).name}")
    seed = f"mmmamba seed {Path(plan.teacher).name} --run RUN --recipe RECIPE --dtype {plan.dtype}"
    found = [f"{seed} --allow-bidirectional" if plan.allow_bidirectional else seed]
    if cell.stages:
        stages = ",".join(cell.stages)
        found.append(f"mmmamba distill --run RUN --recipe RECIPE --stage {stages}")
    names = {"{run}": "RUN", "{recipe}": "RECIPE", "{seed}": str(cell.seed), WORK: "WORK"}
    found += [
        f"mmmamba {shlex.join(fill_placeholders(command, names))}" for command in cell.commands
    ]
    return found + _eval_commands(cell, "--run RUN")


def _eval_commands(cell: Cell, model: str) -> list[str]:
    """A command for each way to answer."""
    found = []
    for by_likelihood in (False, True):
        suites = [use.name for use in cell.suites if use.is_by_likelihood == by_likelihood]
        if suites:
            way = f" --answers {LIKELIHOOD}" if by_likelihood else ""
            found.append(f"mmmamba eval {model} --suite {','.join(suites)}{way}")
    return found
