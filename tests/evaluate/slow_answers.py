"""The command `mmmamba` with batches that take a moment, in processes that are forks."""

from __future__ import annotations

import time
from typing import Any

import forked_launcher

from mmmamba_cli.evaluate import runner

_answer_batch = runner._answer_batch


def answer_batch(*arguments: Any) -> Any:
    time.sleep(1.0)
    return _answer_batch(*arguments)


def run() -> None:
    runner._answer_batch = answer_batch
    forked_launcher.run()
