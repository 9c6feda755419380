"""Commands in processes of their own that do not import torch and transformers again.

The fork server of `multiprocessing` imports the package once; each process is a fork of it, so that
a test can kill or signal a command without seconds of imports. What is tested about the start of a
process itself needs `subprocess`.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from multiprocessing import forkserver, get_context, set_start_method
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import mmmamba_cli
from mmmamba_cli.distill import stage_runner

ROOT = Path(mmmamba_cli.__file__).parents[1]
PRELOADED = [
    "mmmamba_cli.ablation.cell_executor",
    "mmmamba_cli.cli.ablate",
    "mmmamba_cli.cli.distill",
    "mmmamba_cli.cli.distill_display",
    "mmmamba_cli.cli.eval",
    "mmmamba_cli.distill.pipeline",
    "mmmamba_cli.evaluate.model_adapter",
    "mmmamba_evals.scenes.scene_writers",
]


def fork_server() -> ForkServerContext:
    """The context whose processes are forks of a server with the package imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server imports from its working directory; a failed import would only make it slow.
    with chdir(ROOT):
        forkserver.ensure_running()
    return context


class PreloadedProcess:
    """A process that runs `main()` with `words` as its arguments, like `subprocess.Popen`.

    It leads a process group. Its stdout and stderr go to `output`, a file; `environment` is added
    to that of the fork server.
    """

    def __init__(
        self,
        main: Callable[[], None],
        words: list[str],
        output: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self.output = output
        output.write_text("")
        given = (main, words, str(output), dict(environment))
        self._process = fork_server().Process(target=_run, args=given)
        self._process.start()
        atexit.register(self._process.kill)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a preloaded process", timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def text(self) -> str:
        """What it has written up to now."""
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, ready: Callable[[], object], timeout: float = 300) -> None:
        """Wait until `ready()` is true; the process must not end before."""
        deadline = time.monotonic() + timeout
        while not ready():
            assert self.poll() is None, self.text()
            assert time.monotonic() < deadline
            time.sleep(0.002)


def _run(
    main: Callable[[], None], words: list[str], output: str, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    # Processes that the command starts itself are started as usual on this system.
    set_start_method(None, force=True)
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.argv = ["mmmamba", *words]
    # As in `no_plots` of the tests of the pipeline.
    stage_runner.plot_losses = lambda folder: None
    # Creates the thread pool of PyTorch, which a fork lacks, before several threads use it.
    torch.set_num_threads(torch.get_num_threads())
    main()


def free_port() -> int:
    """A TCP port for processes that start later.

    It lies below the ports that Linux and macOS give to sockets without one (from 32768 and 49152),
    so that no connection takes it in the meantime; processes side by side begin 37 ports apart.
    """
    first = 10_000 + 37 * os.getpid() % 20_000
    for port in (*range(first, 30_000), *range(10_000, first)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port from 10000 to 30000")


def run_processes(
    folder: Path, processes: int, main: Callable[[], None], words: Sequence[str]
) -> Any:
    """Run `main` with the folder and `words` on several processes; return process 0's JSON."""
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    started = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        environment = {key: str(value) for key, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = folder / f"output-{processes}-{rank}"
        started.append(PreloadedProcess(main, [str(folder), *words], output, environment))
    codes = [process.wait(timeout=300) for process in started]
    assert not any(codes), [process.text() for process in started]
    return json.loads(started[0].text().splitlines()[-1])
