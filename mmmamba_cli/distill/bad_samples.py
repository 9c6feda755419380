"""Samples of a training that cannot be used: their names, and the share that is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmmamba_cli.data import BadSample
from mmmamba_cli.distill.training_state import Progress
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import DataError

# The share of bad samples is checked from this many samples on.
MIN_SAMPLES_FOR_SHARE = 100


def gather_bad_samples(bad: Iterable[BadSample], world: World) -> list[str]:
    """`name: reason` of the unreadable samples of all processes, without duplicates."""
    local = [sample for sample in bad if world.is_main or not sample.seen_by_all]
    # A short corpus gives a sample several times in one step.
    named = (f"{sample.name}: {sample.reason}" for sample in world.all_gather(local))
    return list(dict.fromkeys(named))


def check_bad_share(
    progress: Progress, named: Sequence[str], max_share: float, is_last: bool
) -> None:
    """Compare the share of bad samples so far with `max_share`.

    Args:
        progress: numbers of samples.
        named: bad samples of the last step, `name: reason`.
        max_share: `data.max_bad_share`.
        is_last: whether the last step is done; the share of few samples counts only then.

    Raises:
        DataError: the share is larger.
    """
    seen = progress.samples + progress.bad_samples
    share = progress.bad_samples / max(1, seen)
    if share <= max_share or (seen < MIN_SAMPLES_FOR_SHARE and not is_last):
        return
    last = "; ".join(named[:3])
    raise DataError(
        f"{progress.bad_samples} of {seen} samples could not be used, more than "
        f"data.max_bad_share = {max_share:g} allows" + (f"; the last: {last}" if last else ""),
        "see them all with `mmmamba data check --all`, or raise data.max_bad_share",
    )
