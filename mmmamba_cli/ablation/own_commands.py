"""An arm's own commands: each takes effect once, whenever the runner is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from mmmamba_cli.ablation.commands import run_mmmamba
from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.runs import Run

# The number of commands that are done, the one that was begun, and the output of all.
COMMANDS_DONE, COMMAND_BEGUN, COMMANDS_LOG = "commands.json", "command.json", "commands.log"
# Where a product lies while it is removed.
REMOVED = "removed"


def run_own_commands(
    run: Run,
    commands: Sequence[Sequence[str]],
    should_stop: Callable[[], bool],
    progress: Callable[[str, int, int], None],
    lock: Callable[[], AbstractContextManager[None]],
) -> None:
    """Run the commands that are not done; `lock` locks the run.

    Raises:
        CommandStopped: a command was asked to save and stop.
        RunError: a command failed, or a process of a killed runner still writes to the run.
    """
    file = run.folder / COMMANDS_DONE
    done = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else 0
    for number, words in enumerate(commands[done:], start=done + 1):
        progress(f"command {number}", number - 1, len(commands))
        _begin(run, number, lock)
        run_mmmamba(words, run.folder / COMMANDS_LOG, should_stop)
        atomic_write_text(file, f"{number}\n")


def _begin(run: Run, number: int, lock: Callable[[], AbstractContextManager[None]]) -> None:
    """Note the products before a command; those of an earlier try that was killed are removed."""
    file = run.folder / COMMAND_BEGUN
    found = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    if found.get("number") == number:
        with lock():
            _undo(run, found)
        return
    begun = {"number": number, "current": run.record.current, "products": sorted(run.products())}
    atomic_write_text(file, json.dumps(begun) + "\n")


def _undo(run: Run, begun: dict[str, Any]) -> None:
    """Remove the hybrids of a command that was killed before it was noted as done.

    `hybridize` refuses a product that is there; `distill` goes on from its own.
    """
    aside = run.folder / REMOVED
    if aside.exists():
        shutil.rmtree(aside)
    for name, product in run.products().items():
        if name not in begun["products"] and product.made_by == "hybridize":
            if run.record.current == name:
                run.set_current(begun["current"])
            run.product_folder(name).rename(aside)
            shutil.rmtree(aside)
