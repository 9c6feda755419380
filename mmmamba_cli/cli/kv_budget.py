"""`--kv-bytes SIZE --context N`: a limit of the bytes of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from mmmamba_cli.cli.options import read_lengths
from mmmamba_cli.errors import RecipeError


@dataclass(frozen=True)
class KVBudget:
    """Bytes of keys and values at a context length in tokens, as given on the command line."""

    size: int
    context: int

    @classmethod
    def parse(cls, size: str | None, context: str | None) -> KVBudget | None:
        """The options --kv-bytes and --context; None without. Raises `RecipeError`."""
        from mmmamba_cli.layer_selection import parse_bytes

        if size is None and context is None:
            return None
        if size is None or context is None:
            raise RecipeError(
                "--kv-bytes and --context belong together",
                "give both, as in --kv-bytes 1GiB --context 100k",
            )
        (length, *more) = read_lengths(context, "--context")
        if more:
            raise RecipeError(f"--context {context} names several lengths", "give one")
        return cls(parse_bytes(size), length)
