"""`mmmamba` whose `--gpus` forks its processes: a spawned one imports for several seconds.

For tests of what happens once training has begun.
"""

from __future__ import annotations

from typing import Any

from mmmamba_cli.__main__ import main
from mmmamba_cli.distributed import launcher

_start_processes = launcher.start_processes


def start_processes(*arguments: Any, **options: Any) -> Any:
    return _start_processes(*arguments, **{**options, "start_method": "fork"})


def run() -> None:
    launcher.start_processes = start_processes
    main()
