"""The limit of the share of samples that cannot be used, `data.max_bad_share`."""

from __future__ import annotations

from collections.abc import Sequence

from mmmamba_cli.errors import DataError


def check_bad_share(bad: int, seen: int, max_share: float, named: Sequence[str]) -> None:
    """Raise `DataError` if more than `max_share` of the samples could not be used.

    Args:
        bad: number of samples that could not be used.
        seen: number of all samples.
        max_share: the limit, from 0 to 1.
        named: some of the bad samples, `name: reason`.
    """
    if bad <= max_share * seen:
        return
    examples = "; ".join(named[:3])
    raise DataError(
        f"{bad} of {seen} samples could not be used, more than data.max_bad_share = "
        f"{max_share:g} allows" + (f"; for example {examples}" if examples else ""),
        "see them all with `mmmamba data check --all`, or raise data.max_bad_share",
    )
