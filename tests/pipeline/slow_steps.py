"""The command `mmmamba` with a third training step that does not end."""

from __future__ import annotations

import sys
import time
from typing import Any

from mmmamba_cli.__main__ import main
from mmmamba_cli.distill import trainer

_step = trainer._step


def step(*arguments: Any) -> Any:
    result = _step(*arguments)
    if result.step == 3:
        sys.stderr.write("in step 3\n")
        time.sleep(300)
    return result


def run() -> None:
    trainer._step = step
    main()
