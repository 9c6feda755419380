"""Options that several commands share, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from mmmamba_cli.cli.completing import complete_products, complete_recipes
from mmmamba_cli.errors import DataError

UNITS = {"": 1, "k": 1024, "m": 1024**2}

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe, or a YAML file.",
        autocompletion=complete_recipes,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field of the recipe, as data.max_length=4096 or stages.stage3.lr=1e-5. "
        "May be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, for machines.")]
RunFolder = Annotated[
    Path,
    typer.Option("--run", envvar="MMMAMBA_RUN", metavar="DIR", help="Run directory."),
]
DEFAULT_RUN = Path("runs/default")
Models = Annotated[
    list[Path] | None,
    typer.Option(
        "--model", metavar="PATH", help="Any checkpoint, in the run's place. May be repeated."
    ),
]
TeacherPath = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Where the teacher is, if it has moved.")
]
FromCurrent = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="PRODUCT",
        help="Product of the run; else the current one.",
        autocompletion=complete_products,
    ),
]
FromParent = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="PRODUCT",
        help="Product to start from.",
        autocompletion=complete_products,
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="cpu or cuda; the best there is if not given.")
]
DType = Annotated[
    str, typer.Option(metavar="DTYPE", help="bf16, fp16 or fp32; auto is bf16 on CUDA, else fp32.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def read_lengths(text: str, option: str = "--contexts") -> tuple[int, ...]:
    """`512,8k,1m` as numbers, each once, ascending."""
    found = set()
    for part in text.split(","):
        word = part.strip().lower()
        number, unit = (word[:-1], word[-1]) if word[-1:] in ("k", "m") else (word, "")
        if not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise DataError(
                f"{option}: {part.strip()!r} is no length",
                f"give numbers of tokens, as in {option} 512,8k,1m, where 8k is 8192",
            )
        found.add(int(number) * UNITS[unit])
    return tuple(sorted(found))
