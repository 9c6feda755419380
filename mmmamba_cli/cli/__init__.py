"""The command `mmmamba`. Importing this package, or asking for --help, imports no torch."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import NoReturn

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.interrupts import INTERRUPTED, is_interrupted

OUR_BUG, USER_MISTAKE = 1, 2
JSON_OPTION = "--json"

# What the operating system refuses that is the user's to mend, and how.
REFUSALS = {
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
    """Run the command line and leave with its exit code.

    0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted, 1 our bug (a traceback)
    or a closed stdout. With --json a mistake is JSON on stdout too:
    `{"error": ..., "hint": ...}`.
    """
    escape_what_cannot_be_encoded()
    try:
        _run()
    except MmmambaError as error:
        _leave(None if error.is_reported_elsewhere else error, USER_MISTAKE)
    except KeyboardInterrupt:
        _leave(None, INTERRUPTED)
    except BrokenPipeError:
        _leave(None, OUR_BUG)
    except Exception as error:
        if is_interrupted(error):
            _leave(None, INTERRUPTED)
        refused = refusal(error) if isinstance(error, OSError) else None
        if refused is None:
            raise
        _leave(refused, USER_MISTAKE)


def refusal(error: OSError) -> MmmambaError | None:
    """A sentence with the path for what the operating system refuses the user, None otherwise."""
    reason = REFUSALS.get(error.errno or 0)
    if reason is None:
        return None
    what, hint = reason
    # A number is an open file's, which says nothing to the user.
    if isinstance(error.filename, str | bytes | os.PathLike):
        return MmmambaError(f"{os.fsdecode(error.filename)}: {what}", hint)
    # A failed write names no file. Other refusals without one are not about the user's files.
    return MmmambaError(what, hint) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def escape_what_cannot_be_encoded() -> None:
    """Letters that the encoding of a stream lacks are written as escapes, `\\u4f60`.

    Names and answers are in any script, a pipe or an old console may be ASCII or cp1252, and a file
    name may hold bytes that are no text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run() -> None:
    from mmmamba_cli.cli.app import run
    from mmmamba_cli.cli.console import plain_warnings

    succeed = None
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from mmmamba_cli.distributed.stop_signals import skip_interpreter_shutdown

        succeed = skip_interpreter_shutdown()
    try:
        with plain_warnings():
            code = run()
        if succeed is not None and not code:
            _flush_stdout()
            succeed()
        sys.exit(code)
    except SystemExit:
        # Here and not when the interpreter ends, where a closed pipe or full disk cannot be caught.
        _flush_stdout()
        raise


def _flush_stdout() -> None:
    # Python has no stdout at all where the caller closed it.
    if sys.stdout is not None:
        sys.stdout.flush()


def _leave(error: MmmambaError | None, code: int) -> NoReturn:
    try:
        # Of several processes that torchrun started, the first speaks for all on stdout.
        speaks = os.environ.get("RANK", "0") == "0"
        if error is not None and speaks and JSON_OPTION in sys.argv[1:]:
            from mmmamba_cli.cli.console import print_json

            print_json({"error": error.message, "hint": error.hint})
        _flush_stdout()
    except OSError:
        # What stdout still holds cannot be written; let the interpreter's last flush succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error is not None:
        from mmmamba_cli.cli.console import print_error

        print_error(str(error))
    sys.exit(code)
