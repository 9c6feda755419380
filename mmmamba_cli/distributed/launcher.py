"""Launcher of the processes of `--gpus` on this machine, with torch's elastic multiprocessing.

torchrun does the same for one or several machines. Here the launching command handles Ctrl-C, the
exit code and the error message, so that they are those of a single process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Timer
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    SignalException,
    start_processes,
)

from mmmamba_cli.distributed.process_failures import (
    ProcessFailure,
    process_failure,
    root_cause,
    was_killed,
)
from mmmamba_cli.distributed.stop_signals import (
    SIGNALS,
    StopSignalCounter,
    exit_by_signal,
    restore_handlers,
    skip_interpreter_shutdown,
    stopping_message,
    write_from_handler,
)
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.interrupts import (
    INTERRUPTED,
    block_interrupts,
    exit_interrupted,
    is_importing,
    unblock_interrupts,
)

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

Argument = TypeVar("Argument")
Result = TypeVar("Result")

HOST = "127.0.0.1"
# Names the signals for which torch installs handlers when it starts processes.
TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
# Seconds until processes are killed after a second stop signal, or after one of them was killed.
KILL_AFTER_SECONDS = 5
# Seconds between two looks at the processes.
POLL_SECONDS = 0.1


def count_processes(gpus: int | None, device: str | None) -> int:
    """The number of processes for `--gpus`. Raises `MmmambaError` if there are too few GPUs."""
    if gpus is None:
        return 1
    if gpus < 1:
        raise MmmambaError(f"--gpus {gpus}: expected 1 or more")
    if "WORLD_SIZE" in os.environ:
        raise MmmambaError(
            "--gpus starts processes, and torchrun has started this one already",
            "leave out --gpus, or start without torchrun",
        )
    if device != "cpu":
        there = torch.cuda.device_count()
        if there < gpus:
            raise MmmambaError(
                f"--gpus {gpus}: this machine has {there or 'no'} GPU{'s' * (there > 1)} that "
                "torch can use",
                f"--device cpu --gpus {gpus} starts {gpus} processes on the CPU"
                if not there
                else f"give --gpus {there} or fewer",
            )
    return gpus


def launch(
    work: Callable[[Argument], Result], argument: Argument, processes: int, unit: str = "step"
) -> Result:
    """Call `work(argument)` in new processes and return the result of process 0.

    `join_world` reads rank and size from the environment, as under torchrun. SIGINT and SIGTERM are
    forwarded, with the message that the processes stop after this `unit`; a second one ends the
    processes at once. If a process fails, the others are ended.

    Raises:
        MmmambaError, OSError: the error of the process that failed first.
        RuntimeError: any other exception of that process, with its traceback as a note.
        ProcessKilled: a process was killed.
    """
    errors: SimpleQueue[ProcessFailure] = get_context("spawn").SimpleQueue()
    # The launcher hosts the store of the process group: it gets a free port and outlives all ranks.
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    ranks = range(processes)
    with ExitStack() as stack:
        logs = stack.enter_context(TemporaryDirectory(prefix="mmmamba-"))
        stack.enter_context(_silence_torch_loggers())
        # As torchrun does.
        stack.enter_context(_environment_variable("OMP_NUM_THREADS", "1"))
        # torch's own handlers raise, also in the middle of a start.
        stack.enter_context(_environment_variable(TORCH_SIGNALS, "SIGHUP,SIGQUIT"))
        try:
            stop_signals = stack.enter_context(_forwarded_signals(unit))
            # An interrupt during imports would end a process badly: `_run` unblocks interrupts.
            with block_interrupts():
                context = start_processes(
                    "mmmamba",
                    _run,
                    args=dict.fromkeys(ranks, (work, argument, errors, os.getpid())),
                    envs={rank: _environment(rank, processes, store.port) for rank in ranks},
                    logs_specs=DefaultLogsSpecs(log_dir=logs),
                    start_method="spawn",
                )
                stop_signals.forward_to(context)
            result = _wait(context, stop_signals)
        except BaseException as error:
            _kill_children()
            if isinstance(error, SignalException):
                # SIGHUP or SIGQUIT, or a torch that ignores TORCH_SIGNALS.
                exit_by_signal(error.sigval)
            raise
    if not result.is_failed():
        return result.return_values[0]
    failures = []
    while not errors.empty():
        failures.append(errors.get())
    if stop_signals.first is not None and all(failure.is_lost_connection for failure in failures):
        # The signal arrived before there was anything to save.
        exit_by_signal(stop_signals.first)
    raise root_cause(failures, result.failures)


def _run(
    work: Callable[[Argument], Result],
    argument: Argument,
    errors: SimpleQueue[ProcessFailure],
    starter: int,
) -> Result:
    """Entry point of one process."""
    succeed = skip_interpreter_shutdown()
    try:
        _take_interrupts()
        result = work(argument)
    except KeyboardInterrupt as error:
        # torch would exit with code 0 and wait for the result forever.
        raise SystemExit(INTERRUPTED) from error
    except SystemExit:
        raise
    except BaseException as error:
        errors.put(process_failure(error))
        # The launching process reports the error.
        raise SystemExit(1) from error
    if os.getppid() != starter:
        # The launcher was killed; torch interrupted this process and would wait for it forever.
        os._exit(1)
    succeed()
    return result


def _take_interrupts() -> None:
    """Handle SIGINT: the first raises `KeyboardInterrupt`, or ends the process during an import.

    The terminal and the launcher both send one, so a second one within a second is a copy and is
    ignored, as it would interrupt the cleanup. A later one ends the process, as does one that
    arrives in a finaliser, which cannot propagate exceptions.
    """
    repeats = StopSignalCounter()

    def interrupt(number: int, frame: FrameType | None) -> None:
        is_second = repeats.is_repeat()
        is_first = repeats.count == 1
        if is_second or (is_first and is_importing(frame)):
            exit_interrupted()
        if is_first:
            raise KeyboardInterrupt

    def end_in_finaliser(failure: UnraisableHookArgs) -> None:
        if issubclass(failure.exc_type, KeyboardInterrupt):
            exit_interrupted()
        sys.__unraisablehook__(failure)

    sys.unraisablehook = end_in_finaliser
    signal.signal(signal.SIGINT, interrupt)
    unblock_interrupts()


def _kill_children() -> None:
    """Kill processes that are still running, before their semaphores are removed.

    A process that is still unpickling its arguments would print a traceback.
    """
    children = active_children()
    _kill(children)
    for child in children:
        child.join()


def _kill(children: list[BaseProcess]) -> None:
    for child in children:
        child.kill()


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        # The launcher hosts the store at that port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


@dataclass
class _StopSignals:
    """Stop signals: forwards them to the processes, or once these are started.

    The handler never raises: SIGINT is blocked during the start, but another thread may receive it,
    and the handler then runs here.
    """

    message: str
    first: int | None = None
    second: int | None = None
    repeats: StopSignalCounter = field(default_factory=StopSignalCounter)
    context: PContext | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.repeats.is_repeat():
            self.second = number
        elif self.repeats.count == 1:
            self.first = number
            write_from_handler(self.message)
        self._send(number)

    def forward_to(self, context: PContext) -> None:
        """Forward signals to started processes, the first one included."""
        self.context = context
        # A torch that ignores TORCH_SIGNALS has replaced the handlers.
        for number in SIGNALS:
            signal.signal(number, self.handle)
        if self.first is not None:
            self._send(self.first)

    def _send(self, number: int) -> None:
        if self.context is None:
            return
        for pid in self.context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


@contextmanager
def _forwarded_signals(unit: str) -> Iterator[_StopSignals]:
    """Handle stop signals; the handlers of before are restored at the end."""
    stop_signals = _StopSignals(stopping_message(unit))
    before = {number: signal.signal(number, stop_signals.handle) for number in SIGNALS}
    try:
        yield stop_signals
    finally:
        restore_handlers(before, stop_signals.repeats)


def _wait(context: PContext, stop_signals: _StopSignals) -> Any:
    """Wait for the result of all processes; exit after a second stop signal.

    If a signal ended a process, torch waits for the others for half a minute. Those that are in a
    collective on GPUs do not end by themselves, and are killed sooner.
    """
    killer = Timer(KILL_AFTER_SECONDS, _kill, [active_children()])
    killer.daemon = True
    try:
        while True:
            is_undisturbed = stop_signals.first is None and killer.ident is None
            if is_undisturbed and was_killed(context.pids().values()):
                killer.start()
            result = context.wait(timeout=0)
            if stop_signals.second is not None:
                context.close(signal.Signals(stop_signals.second), timeout=KILL_AFTER_SECONDS)
                exit_by_signal(stop_signals.second)
            if result is not None:
                return result
            time.sleep(POLL_SECONDS)
    finally:
        killer.cancel()


@contextmanager
def _silence_torch_loggers() -> Iterator[None]:
    """Silence torch's log messages about processes that failed or are ended."""
    loggers = [
        logging.getLogger("torch.distributed.elastic.multiprocessing.api"),
        logging.getLogger("torch.multiprocessing.spawn"),
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
