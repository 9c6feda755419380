"""An environment for the tests that does not depend on who runs them.

`conftest.py` calls `clear_environment` before it imports torch, transformers or rich, which read
some of the variables while they are imported. Processes that tests start inherit the result.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# Variables of this project, of the terminal, of continuous integration and of torchrun.
NAMES = frozenset(
    {
        "MMMAMBA_RUN",
        "LMUData",
        "COLUMNS",
        "LINES",
        "COLORTERM",
        "NO_COLOR",
        "FORCE_COLOR",
        "CLICOLOR",
        "CLICOLOR_FORCE",
        "PY_COLORS",
        "TERMINAL_WIDTH",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        # transformers passes its records to the root logger where CI is set.
        "CI",
        "GITHUB_ACTIONS",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_WAIT_POLICY",
        "PYTHONUNBUFFERED",
        "PYTHONWARNINGS",
        "HUGGING_FACE_HUB_TOKEN",
    }
)
# Of TRANSFORMERS_*, TRANSFORMERS_TESTS is read by the Makefile's `conformance` only.
PREFIXES = ("HF_", "TRANSFORMERS_", "JUPYTER_", "TYPER_", "_TYPER_", "TORCHELASTIC_")


def clear_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Delete the variables of NAMES and PREFIXES, and set the kind of terminal."""
    for name in [*environment]:
        if name in NAMES or name.startswith(PREFIXES):
            del environment[name]
    environment["TERM"] = "xterm"
