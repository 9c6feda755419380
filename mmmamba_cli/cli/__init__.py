"""The command `mmmamba`. Importing this package, or asking for --help, imports no torch."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

from mmmamba_cli.errors import MmmambaError

OUR_BUG, USER_MISTAKE, INTERRUPTED = 1, 2, 130

# What the operating system refuses that is the user's to mend, and how.
REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; check who may read and write it",
    errno.EPERM: "permission denied; check who may read and write it",
}


def main() -> None:
    """Run the command line and leave with its exit code.

    0 done, 2 the user's mistake (one sentence on stderr), 130 interrupted, 1 our bug (a traceback)
    or nobody left to read the output.
    """
    try:
        _run()
    except MmmambaError as error:
        _leave(str(error), USER_MISTAKE)
    except KeyboardInterrupt:
        _leave(None, INTERRUPTED)
    except BrokenPipeError:
        _leave(None, OUR_BUG)
    except OSError as error:
        sentence = refusal(error)
        if sentence is None:
            raise
        _leave(sentence, USER_MISTAKE)


def refusal(error: OSError) -> str | None:
    """A sentence with the path for what the operating system refuses the user, None otherwise."""
    reason = REFUSALS.get(error.errno or 0)
    if reason is None:
        return None
    # A number is an open file's, which says nothing to the user.
    if isinstance(error.filename, str | bytes | os.PathLike):
        return f"{os.fsdecode(error.filename)}: {reason}"
    # A failed write names no file. Other refusals without one are not about the user's files.
    return reason if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def _run() -> None:
    from mmmamba_cli.cli.app import app
    from mmmamba_cli.cli.console import plain_warnings

    try:
        with plain_warnings():
            app(prog_name="mmmamba")
    except SystemExit:
        # Here and not when the interpreter ends, where a closed pipe or full disk cannot be caught.
        _flush_stdout()
        raise


def _flush_stdout() -> None:
    # Python has no stdout at all where the caller closed it.
    if sys.stdout is not None:
        sys.stdout.flush()


def _leave(sentence: str | None, code: int) -> NoReturn:
    try:
        _flush_stdout()
    except OSError:
        # What stdout still holds cannot be written; let the interpreter's last flush succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if sentence is not None:
        from mmmamba_cli.cli.console import print_error

        print_error(sentence)
    sys.exit(code)
