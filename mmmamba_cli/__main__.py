"""The command `mmmamba`: the console script, and `python -m mmmamba_cli`."""

import os
import sys

USER_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line; handle SIGINT before other imports."""
    if sys.platform == "win32":
        # Imports below need fcntl, which locks run directories and is not part of Windows.
        sys.stderr.write("error: mmmamba does not run on Windows (use WSL 2: docs/versions.md)\n")
        sys.exit(USER_ERROR)
    try:
        from mmmamba_cli.interrupts import exit_on_interrupt, handle_interrupts

        handle_interrupts()
        from mmmamba_cli.cli import main as run

        try:
            run()
        finally:
            exit_on_interrupt()
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
