"""`mmmamba` with a Ctrl-C that arrives as soon as the processes of `--gpus` are started."""

from __future__ import annotations

from typing import Any

from mmmamba_cli.cli import main
from mmmamba_cli.distributed import launcher

_start_processes = launcher.start_processes


def start_processes(*arguments: Any, **options: Any) -> Any:
    _start_processes(*arguments, **options)
    raise KeyboardInterrupt


launcher.start_processes = start_processes
if __name__ == "__main__":
    main()
