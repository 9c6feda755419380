"""`mmmamba` whose `--gpus` forks its processes: a spawned one imports for several seconds.

For tests of what happens once training has begun.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from mmmamba_cli.__main__ import main
from mmmamba_cli.distributed import launcher

_start_processes = launcher.start_processes


def start_processes(name: str, entrypoint: Callable[..., Any], **options: Any) -> Any:
    all_forked = get_context("fork").Event()

    def run_when_all_are_forked(*arguments: Any) -> Any:
        all_forked.wait()
        # torch makes a new thread pool at its first use after a fork, which fails in two threads.
        torch.set_num_threads(torch.get_num_threads())
        return entrypoint(*arguments)

    # The first process would connect to the store of this one, whose thread takes a lock of the C
    # library meanwhile: forked at that moment, the second process would wait for it forever.
    context = _start_processes(name, run_when_all_are_forked, **{**options, "start_method": "fork"})
    all_forked.set()
    return context


def run() -> None:
    launcher.start_processes = start_processes
    main()
