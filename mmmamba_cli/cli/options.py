"""Options that several commands share, and shell completion of names without importing torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmmamba_cli.errors import DataError

PRODUCTS, MANIFEST = "products", "manifest.json"
TEACHER = "teacher"


def complete_products(context: typer.Context, incomplete: str) -> list[str]:
    """Complete products of the run given by --run, MMMAMBA_RUN or the default."""
    run = context.params.get("run") or os.environ.get("MMMAMBA_RUN") or DEFAULT_RUN
    try:
        folders = sorted(Path(run, PRODUCTS).iterdir())
    except OSError:
        return []
    return [
        folder.name
        for folder in folders
        if folder.name.startswith(incomplete) and (folder / MANIFEST).is_file()
    ]


def complete_models(context: typer.Context, incomplete: str) -> list[str]:
    """Complete products and `teacher`."""
    named = complete_products(context, incomplete)
    return [*named, TEACHER] if TEACHER.startswith(incomplete) else named


def complete_recipes(incomplete: str) -> list[str]:
    """Complete names of shipped recipes."""
    from mmmamba_cli.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


UNITS = {"": 1, "k": 1024, "m": 1024**2}
MAX_LENGTH = 2**31 - 1
# As `recipe.section.MAX_SEED`, whose import is slow.
MAX_SEED = 2**32 - 1

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
        help="Set a recipe field, such as data.max_length=4096 or stages.stage3.lr=1e-5. "
        "May be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
RunFolder = Annotated[
    Path,
    typer.Option("--run", envvar="MMMAMBA_RUN", metavar="DIR", help="Run directory."),
]
DEFAULT_RUN = Path("runs/default")
Models = Annotated[
    list[Path] | None,
    typer.Option(
        "--model", metavar="PATH", help="Checkpoint to use instead of the run. May be repeated."
    ),
]
TeacherPath = Annotated[
    Path | None, typer.Option(metavar="PATH", help="Path of the teacher, if it has moved.")
]
FromCurrent = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="PRODUCT",
        help="Product of the run (default: the current one).",
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
    str | None, typer.Option(metavar="DEVICE", help="cpu or cuda (default: cuda if available).")
]
DType = Annotated[
    str, typer.Option(metavar="DTYPE", help="bf16, fp16, fp32, or auto: bf16 on CUDA, else fp32.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]


def read_lengths(text: str, option: str = "--contexts") -> tuple[int, ...]:
    """Parse `512,8k,1m` to unique token counts in ascending order."""
    found = set()
    for part in text.split(","):
        word = part.strip().lower()
        number, unit = (word[:-1], word[-1]) if word[-1:] in ("k", "m") else (word, "")
        if not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise DataError(
                f"{option}: {part.strip()!r} is no length",
                f"give numbers of tokens, as in {option} 512,8k,1m, where 8k is 8192",
            )
        length = int(number) * UNITS[unit]
        if length > MAX_LENGTH:
            raise DataError(
                f"{option}: {part.strip()!r} is too long", f"give at most {MAX_LENGTH} tokens"
            )
        found.add(length)
    return tuple(sorted(found))


def layers_in_words(layers: Sequence[int], total: int) -> str:
    """`layers 0, 4 of 8`, `layer 0 of 8` or `no layer of 8`."""
    listed = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"{listed if layers else 'no layer'} of {total}"


def check_output_folder(folder: Path) -> None:
    """Raise `DataError` if files cannot be written to `folder`, before they are measured."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    reason = None if there.is_dir() else f"{there} is not a folder"
    if reason is None and not os.access(there, os.W_OK | os.X_OK):
        reason = f"{there} may not be written to"
    if reason is not None:
        raise DataError(f"no files can be written to {folder}: {reason}", "give another --out")
