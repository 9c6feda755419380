"""The command `mmmamba`: entry point, exit codes and error output. --help imports no torch."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import NoReturn

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.interrupts import INTERRUPTED, is_interrupted

# How messages of torch begin; its handler of SIGCHLD raises the error anywhere in this process.
KILLED_WORKER = "DataLoader worker (pid"
# Its names of signals of a crash in native code, which is a bug and keeps its traceback.
CRASHES = ("Aborted", "Segmentation fault", "Illegal instruction", "Floating point exception")
EXIT_BUG, EXIT_USER_ERROR = 1, 2
JSON_OPTION = "--json"

# Operating system errors that the user can fix: message and hint.
OS_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.EACCES: ("permission denied", "check who may read and write it"),
    errno.EPERM: ("permission denied", "check who may read and write it"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "check the path"),
    errno.EISDIR: ("this is a folder, not a file", "check the path"),
    errno.EEXIST: ("something of this name is in the way", "choose another name"),
}


def main() -> None:
    """Run the command line and exit with its code.

    0 success, 2 user error (one sentence on stderr), 130 interrupted, 1 a bug in mmmamba (with
    traceback) or a closed stdout. With --json a user error is also printed as JSON on stdout:
    `{"error": ..., "hint": ...}`.
    """
    escape_unencodable_output()
    try:
        _run()
    except MmmambaError as error:
        _exit_with(None if error.is_reported_elsewhere else error, EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _exit_with(None, INTERRUPTED)
    except BrokenPipeError:
        _exit_with(None, EXIT_BUG)
    except Exception as error:
        if is_interrupted(error):
            _exit_with(None, INTERRUPTED)
        translated = user_error(error) if isinstance(error, OSError) else library_error(error)
        if translated is None:
            raise
        _exit_with(translated, EXIT_USER_ERROR)


def user_error(error: OSError) -> MmmambaError | None:
    """The message for an operating system error that the user can fix, else None."""
    reason = OS_ERRORS.get(error.errno or 0)
    if reason is None:
        return None
    what, hint = reason
    # An integer file name is a descriptor, which means nothing to the user.
    if isinstance(error.filename, str | bytes | os.PathLike):
        return MmmambaError(f"{os.fsdecode(error.filename)}: {what}", hint)
    # A failed write names no file. Other errors without a file are not about the user's files.
    return MmmambaError(what, hint) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def library_error(error: Exception) -> MmmambaError | None:
    """The message for packages that do not match or a killed process of a `DataLoader`, or None."""
    if _is_killed_worker(error):
        return MmmambaError(
            "a process that prepares data was killed, often because memory ran out",
            "start again with fewer --workers (of training: data.workers)",
        )
    from mmmamba_cli.versions import TORCHVISION_REMEDY, torchvision_problem

    problem = torchvision_problem(error)
    return None if problem is None else MmmambaError(f"torchvision {problem}", TORCHVISION_REMEDY)


def _is_killed_worker(error: Exception) -> bool:
    if not isinstance(error, RuntimeError) or not str(error).startswith(KILLED_WORKER):
        return False
    # "exited unexpectedly" is raised from the error that names the signal.
    text = f"{error} {error.__cause__}"
    return not any(crash in text for crash in CRASHES)


def escape_unencodable_output() -> None:
    """Write characters that stdout or stderr cannot encode as escapes, `\\u4f60`.

    Names and answers use any script, a pipe or an old console may be ASCII or cp1252, and a file
    name may hold undecodable bytes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run() -> None:
    from mmmamba_cli.cli.app import run
    from mmmamba_cli.cli.console import plain_warnings
    from mmmamba_cli.cli.quiet_timer import import_notes

    succeed = None
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mmmamba_cli.distributed.stop_signals import skip_interpreter_shutdown

        succeed = skip_interpreter_shutdown()
    try:
        with plain_warnings(), import_notes():
            code = run()
        if succeed is not None and not code:
            _flush_stdout()
            succeed()
        sys.exit(code)
    except SystemExit:
        # Flush here: an error in the flush at interpreter exit cannot be caught.
        _flush_stdout()
        raise


def _flush_stdout() -> None:
    # sys.stdout is None if the caller closed it.
    if sys.stdout is not None:
        sys.stdout.flush()


def _exit_with(error: MmmambaError | None, code: int) -> NoReturn:
    try:
        # Under torchrun only rank 0 writes to stdout.
        is_first = os.environ.get("RANK", "0") == "0"
        if error is not None and is_first and JSON_OPTION in sys.argv[1:]:
            from mmmamba_cli.cli.console import print_json

            print_json({"error": error.message, "hint": error.hint})
        _flush_stdout()
    except OSError:
        # The buffer cannot be written; redirect it so that the flush at exit succeeds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error is not None:
        from mmmamba_cli.cli.console import print_error

        print_error(str(error))
    sys.exit(code)
