"""Pools that run cells: in this process, or side by side in processes of their own.

A process runs many cells, so that torch is imported and kernels are compiled once in it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from typing import Any

import torch

from mmmamba_cli.ablation.cell_executor import CellExecutor, CellStopped, Control, Setting
from mmmamba_cli.ablation.cells import SharedStages
from mmmamba_cli.ablation.plan_progress import Unit
from mmmamba_cli.ablation.runner import UnitEnd
from mmmamba_cli.devices import OutOfMemory, pick_device
from mmmamba_cli.errors import DeviceMemoryError, MmmambaError
from mmmamba_cli.interrupts import block_interrupts

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
# Seconds between looks at the runner's request to stop.
POLL_SECONDS = 0.5
# Least seconds between two reports of a process about its steps.
REPORT_SECONDS = 0.5
# Seconds until a process that does not stop is ended.
STOP_SECONDS = 60.0

Report = Callable[[str, str, int, int], None]


def run_unit(
    executor: CellExecutor, unit: Unit, parent: SharedStages | None, control: Control
) -> UnitEnd:
    """Run a unit and say how it ended. A bug's traceback is printed, and the others go on."""
    try:
        if isinstance(unit, SharedStages):
            executor.train_shared_stages(unit, control)
        else:
            executor.run_cell(unit, parent, control)
    except CellStopped:
        return UnitEnd(unit, "stopped")
    except (DeviceMemoryError, OutOfMemory, torch.OutOfMemoryError) as error:
        return UnitEnd(unit, "out of memory", str(error))
    except (MmmambaError, OSError) as error:
        return UnitEnd(unit, "failed", str(error))
    except Exception as error:  # noqa: BLE001  a cell's bug must not cost the others
        traceback.print_exc()
        return UnitEnd(unit, "failed", f"{type(error).__name__}: {error}")
    return UnitEnd(unit, "finished")


def release_memory() -> None:
    """Free the models of a unit, so that other processes can use the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class InlinePool:
    """Runs one unit at a time in this process."""

    def __init__(
        self,
        setting: Setting,
        say: Callable[[str], None],
        report: Report,
        should_stop: Callable[[], bool],
    ):
        self._executor = CellExecutor(setting)
        self._say, self._report, self._should_stop = say, report, should_stop
        self._next: tuple[Unit, SharedStages | None, float | None] | None = None

    @property
    def running(self) -> Sequence[Unit]:
        return () if self._next is None else (self._next[0],)

    @property
    def devices(self) -> int:
        return 1

    def start(
        self, unit: Unit, parent: SharedStages | None, deadline: float | None, sharing: int
    ) -> None:
        self._next = (unit, parent, deadline)

    def wait(self) -> list[UnitEnd]:
        assert self._next is not None
        unit, parent, deadline = self._next
        control = Control(
            should_stop=lambda: self._should_stop() or is_over(deadline),
            say=lambda text: self._say(f"{unit.name}: {text}"),
            progress=lambda what, done, total: self._report(unit.name, what, done, total),
        )
        end = run_unit(self._executor, unit, parent, control)
        release_memory()
        self._next = None
        return [end]

    def close(self) -> None:
        """Nothing to end."""


def is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def visible_gpus(device: str | None) -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES that processes may use; none on a CPU."""
    chosen = pick_device(device)
    if chosen.type != "cuda":
        return []
    names = os.environ.get(VISIBLE_DEVICES)
    listed = names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]
    return listed if chosen.index is None else [listed[chosen.index]]


def least_used(gpus: Sequence[str], used: Sequence[str | None]) -> str | None:
    """The first GPU that the fewest processes use."""
    return min(gpus, key=used.count, default=None)


class _Worker:
    """A process that runs one unit after another, on one GPU where there are any."""

    def __init__(self, setting: Setting, stop: Event, gpu: str | None):
        self.gpu = gpu
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_work, args=(setting, theirs, stop, gpu), daemon=False
        )
        # The runner gets Ctrl-C and asks the processes to save and stop.
        with block_interrupts():
            self.process.start()
        theirs.close()
        self.unit: Unit | None = None
        # The most other units that have run on the same device beside this one.
        self.beside = 0


class ProcessPool:
    """Runs units side by side, each in a process of its own; a process that dies is replaced."""

    def __init__(
        self,
        setting: Setting,
        say: Callable[[str], None],
        report: Report,
        should_stop: Callable[[], bool],
    ):
        self._setting, self._say, self._report = setting, say, report
        self._should_stop = should_stop
        self._stop = get_context("spawn").Event()
        self._workers: list[_Worker] = []
        self._gpus = visible_gpus(setting.device)

    @property
    def running(self) -> Sequence[Unit]:
        return [worker.unit for worker in self._workers if worker.unit is not None]

    @property
    def devices(self) -> int:
        return max(1, len(self._gpus))

    def start(
        self, unit: Unit, parent: SharedStages | None, deadline: float | None, sharing: int
    ) -> None:
        worker = self._idle_worker()
        worker.unit, worker.beside = unit, 0
        there = [one for one in self._busy() if one.gpu == worker.gpu]
        for one in there:
            one.beside = max(one.beside, len(there) - 1)
        _send(worker.connection, (unit, parent, deadline, 1 / sharing))

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.unit is not None]

    def _idle_worker(self) -> _Worker:
        """An idle process on the GPU with the fewest units, or a new one there."""
        gpu = least_used(self._gpus, [one.gpu for one in self._busy()])
        idle = [one for one in self._workers if one.unit is None]
        there = [one for one in idle if one.gpu == gpu]
        if not there and len(self._workers) < self._setting.jobs:
            self._workers.append(_Worker(self._setting, self._stop, gpu))
            return self._workers[-1]
        return (there or idle)[0]

    def wait(self) -> list[UnitEnd]:
        ended: list[UnitEnd] = []
        while not ended:
            if self._should_stop():
                self._stop.set()
            busy = {one.connection: one for one in self._busy()}
            for connection in wait(list(busy), timeout=POLL_SECONDS):
                end = self._receive(busy[connection])  # type: ignore[index]
                if end is not None:
                    ended.append(end)
        return ended

    def _receive(self, worker: _Worker) -> UnitEnd | None:
        """One message of a worker; its end if the unit has ended."""
        assert worker.unit is not None
        unit = worker.unit
        try:
            kind, *values = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self._workers.remove(worker)
            code = worker.process.exitcode
            if code == -signal.SIGTERM and self._should_stop():
                # A request to stop reached a process before it handled signals.
                return UnitEnd(unit, "stopped")
            return UnitEnd(unit, "failed", f"its process ended with exit code {code}")
        if kind == "say":
            self._say(f"{unit.name}: {values[0]}")
        elif kind == "progress":
            self._report(unit.name, *values)
        else:
            worker.unit = None
            status, message = values
            return UnitEnd(unit, status, message, worker.beside)
        return None

    def close(self) -> None:
        """End the processes; units that run are asked to save and stop first."""
        self._stop.set()
        for worker in self._workers:
            _send(worker.connection, None)
        for worker in self._workers:
            worker.process.join(STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _work(setting: Setting, connection: Connection, stop: Event, gpu: str | None) -> None:
    """Run the units that arrive until the runner sends None or is gone."""
    runner = parent_process()
    # A scheduler signals all processes of a job: the runner asks this one to save and stop.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if runner is not None:
        # The processes share the cores.
        torch.set_num_threads(max(1, torch.get_num_threads() // setting.jobs))
    if gpu is not None:
        # CUDA is not initialised yet: this process sees one GPU, which is its cuda:0.
        os.environ[VISIBLE_DEVICES] = gpu
        setting = replace(setting, device="cuda")
    executor = CellExecutor(setting)
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            return
        unit, parent, deadline, memory_share = message
        last = 0.0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last >= REPORT_SECONDS:
                last = now
                _send(connection, ("progress", what, done, total))

        control = Control(
            # A runner that was killed cannot ask.
            should_stop=lambda deadline=deadline: (  # type: ignore[misc]
                stop.is_set() or is_over(deadline) or (runner is None or not runner.is_alive())
            ),
            say=lambda text: _send(connection, ("say", text)),
            progress=progress,
            memory_share=memory_share,
        )
        end = run_unit(executor, unit, parent, control)
        release_memory()
        sys.stdout.flush()
        _send(connection, ("end", end.status, end.message))


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError:
        # The other end is gone. A unit stops at its next step, and the runner reads the end of a
        # process when it waits for it.
        return
