"""Run a command again and again, killed at a file operation each time, until it ends by itself.

Arguments: JSON with `words` of the command, `folder` below which operations count, and `kills`: a
list of places, each the number of an operation, or [event, part of the path, how many-th such
operation]; and a file for the report. It has one JSON line for each start: where it was killed, or
its exit code and the number of operations. Starts are forks of this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch

from mmmamba_cli.cli import main

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


class Killer:
    """An audit hook that counts write operations below `folder` and kills at one of them."""

    def __init__(self, folder: str, place: Any, report: int):
        self.folder, self.place, self.report = folder, place, report
        self.count = self.matching = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
        if not writes and event not in EVENTS:
            return
        path = str(arguments[0])
        if event == "os.rename":
            path = f"{path} -> {arguments[1]}"
        # Removals inside a folder have paths relative to it.
        if self.folder not in path and path.startswith("/"):
            return
        self.count += 1
        if isinstance(self.place, list):
            wanted_event, part, number = self.place
            self.matching += event == wanted_event and part in path
            hit = self.matching == number
        else:
            hit = self.count == self.place
        if hit:
            self.say(
                {"killed": f"{event} {path.replace(self.folder, '')}", "operation": self.count}
            )
            os.kill(os.getpid(), signal.SIGKILL)

    def say(self, record: dict[str, Any]) -> None:
        os.write(self.report, (json.dumps(record) + "\n").encode())


def start(words: list[str], folder: str, place: Any, report: int) -> bool:
    """Start the command once; return whether it ended by itself."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return not os.WIFSIGNALED(status)
    # A fork has no thread pool of PyTorch until the first use creates one. Two writer threads whose
    # first uses coincide may find none: "Invalid thread pool!". This call creates it.
    torch.set_num_threads(1)
    killer = Killer(folder, place, report)
    sys.addaudithook(killer)
    sys.argv = ["mmmamba", *words]
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    killer.say({"exit": code, "operations": killer.count})
    os._exit(0)


def run() -> None:
    torch.set_num_threads(1)
    spec = json.loads(sys.argv[1])
    report = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for place in [*spec["kills"], 0]:
        if start(spec["words"], spec["folder"], place, report):
            return
