"""Steps of a verification: each gives results, and a failure of one does not end the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.verification.report import DIFFERENT, SKIPPED, CheckResult

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Step:
    """A check under the name of its row in the table; `run` gives its results, one or several."""

    name: str
    run: Callable[[], CheckResult | Sequence[CheckResult]]


def run_step(step: Step, progress: Progress) -> list[CheckResult]:
    """The results of a step.

    An exception is a difference too: the stock class or a student fails on this teacher. If memory
    runs out, the check is skipped.
    """
    progress(step.name)
    try:
        found = translate_out_of_memory(step.run)
    except OutOfMemory as error:
        return [CheckResult(step.name, SKIPPED, f"out of memory: {error}")]
    except MmmambaError as error:
        return [CheckResult(step.name, DIFFERENT, str(error))]
    except Exception as error:  # noqa: BLE001  classes of any family raise anything
        return [CheckResult(step.name, DIFFERENT, describe_exception(error))]
    return [found] if isinstance(found, CheckResult) else list(found)


def skipped(names: Sequence[str], reason: str) -> list[CheckResult]:
    """Results of checks that cannot run, all for the same reason."""
    return [CheckResult(name, SKIPPED, reason) for name in names]


def require_loaded(result: CheckResult) -> None:
    """Raise `MmmambaError` if a model was not loaded for lack of memory: nothing can be said."""
    if result.status == SKIPPED:
        raise MmmambaError(
            f"{result.name}: {result.detail}", "give --dtype bf16, or a device with more memory"
        )


def describe_exception(error: BaseException) -> str:
    """Type, first line and place of an exception, on one line."""
    first = (str(error).strip().splitlines() or ["without a message"])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first}{place}"
