"""The command `mmmamba`: the console script, and `python -m mmmamba_cli`."""

import os

INTERRUPTED = 130


def main() -> None:
    """Run the command line; handle SIGINT before other imports."""
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
