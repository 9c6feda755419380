"""`mmmamba scenes`: build suites and lessons, look at them, check that they cannot be guessed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import (
    err,
    help_if_bare,
    if_interrupted,
    out,
    print_json,
    print_table,
    progress,
)
from mmmamba_cli.cli.next_steps import (
    SCENES_FOLDER,
    NextSteps,
    command_line,
    default_run,
    free_folder,
    steps_after_drawing,
)
from mmmamba_cli.cli.options import AsJson, Overwrite

if TYPE_CHECKING:
    from mmmamba_evals.scenes.atlas import Atlas
    from mmmamba_evals.scenes.world import World

command = typer.Typer(
    help="Draw scenes with questions: suites, lessons, contact sheets.",
    invoke_without_command=True,
)
command.callback()(help_if_bare)

AtlasFolders = Annotated[
    list[Path] | None,
    typer.Option(
        "--atlas",
        metavar="DIR",
        help="Atlas, a folder of CLASS/*.png (default: the shipped one). May be repeated to merge "
        "atlases.",
    ),
]
Style = Annotated[
    str,
    typer.Option(
        metavar="STYLE",
        help="Style of the shipped atlas: noto, or fluent with the fonts reserved for tests.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the scenes.")]


@command.command()
def build(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")],
    atlas: AtlasFolders = None,
    style: Style = "noto",
    pictures: Annotated[
        int, typer.Option(min=1, metavar="N", help="Pictures per category of the suite.")
    ] = 100,
    lessons: Annotated[
        int, typer.Option(min=0, metavar="N", help="Pictures of the training data; 0 for none.")
    ] = 1000,
    short: Annotated[
        bool,
        typer.Option(
            "--short",
            help="Write only lessons about single pictures: none about several, no long texts.",
        ),
    ] = False,
    questions: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Largest number of questions of a conversation."),
    ] = 4,
    workers: Annotated[
        int, typer.Option(min=0, metavar="N", help="Number of processes that draw lessons.")
    ] = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write SCENES.tsv for evaluation, lessons.jsonl for training."""
    from mmmamba_cli.checkpoint import atomic_folder
    from mmmamba_cli.checkpoint.atomic_writes import check_replaceable, unlisted_files
    from mmmamba_cli.runs import Run
    from mmmamba_evals.scenes.categories import SPLITS
    from mmmamba_evals.scenes.sampling import available_categories
    from mmmamba_evals.scenes.scene_writers import (
        LESSONS,
        PICTURES,
        TABLE,
        write_lessons,
        write_suite,
    )

    drawn, world = _open(atlas, style)
    known = (TABLE, LESSONS, f"{PICTURES}/*.png")

    def check(place: Path) -> None:
        check_replaceable(place, lambda found: unlisted_files(found, known), "mmmamba scenes build")

    with (
        if_interrupted(f"nothing was written to {folder}; repeat the command"),
        atomic_folder(folder, overwrite, check) as partial,
    ):
        total = pictures * (len(SPLITS) + len(available_categories(world)))
        with progress("drawing the suite", total, "pictures") as advance:
            asked = write_suite(partial / TABLE, drawn, world, seed, pictures, pictures, advance)
        if lessons:
            with progress("drawing lessons", lessons, "pictures") as advance:
                # Lessons and suite share no scene: other seeds.
                other = seed + 1_000_003
                write_lessons(
                    partial, drawn, world, other, lessons, advance, workers, short, questions
                )
    found = {
        "folder": str(folder),
        "classes": len(world.classes),
        "questions": asked,
        "lessons": lessons,
        "atlas": drawn.digest,
    }
    if as_json:
        print_json(found)
        return
    out().print(f"{asked} questions about {total} pictures: {folder / TABLE}", soft_wrap=True)
    if lessons:
        out().print(f"{lessons} lessons: {folder / LESSONS}", soft_wrap=True)
    steps_after_drawing(Run(default_run()), folder, folder / LESSONS if lessons else None).print()


@command.command()
def sheet(
    file: Annotated[Path, typer.Option("--out", metavar="PNG", help="Picture to write.")],
    atlas: AtlasFolders = None,
    style: Style = "noto",
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Scenes per category.")] = 6,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Draw a contact sheet, one column per category.

    Sample questions are printed to stdout.
    """
    from random import Random

    from mmmamba_cli.errors import DataError
    from mmmamba_evals.scenes.blind_baseline import category_draws
    from mmmamba_evals.scenes.renderer import contact_sheet, render

    if file.is_dir():
        raise DataError(f"{file} is a folder", "give a file, as in --out sheet.png")
    if file.exists() and not overwrite:
        raise DataError(f"{file} already exists", "--overwrite replaces it")
    drawn, world = _open(atlas, style)
    draws = category_draws(world)
    pictures = []
    for row in range(rows):
        for name, draw in draws.items():
            scene, asked = draw(Random(f"{seed} sheet {name} {row}"), world)
            pictures.append(render(scene, drawn))
            if row == 0:
                for one in asked[:2]:
                    out().print(f"{name}: {one.text} {one.answer}", soft_wrap=True)
    contact_sheet(pictures, len(draws)).save(file, "PNG")
    err().print(f"wrote {file}", soft_wrap=True)


@command.command()
def blind(
    atlas: AtlasFolders = None,
    questions: Annotated[
        int, typer.Option(min=30, metavar="N", help="Questions per category and seed.")
    ] = 3000,
    seeds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of independent repeats, pooled.")
    ] = 3,
    as_json: AsJson = False,
) -> None:
    """Guess answers without the picture: a baseline.

    All categories but the leaky control must be near 50 %.
    """
    from mmmamba_evals.scenes.blind_baseline import CONTROL, LEVEL, blind_table, category_draws
    from mmmamba_evals.scenes.shipped import STYLES

    styles = [None] if atlas else list(STYLES)
    worlds = {style or "atlas": _open(atlas, style or STYLES[0])[1] for style in styles}
    found = []
    total = sum(len(category_draws(world)) for world in worlds.values()) + 1
    with progress("guessing", total, "categories") as advance:
        for result in blind_table(worlds, range(seeds), questions):
            found.append(result)
            advance(1)
    tests = sum(split != CONTROL for split, _, _ in found)
    if as_json:
        table: dict[str, dict[str, dict[str, float | int]]] = {}
        for split, name, one in found:
            table.setdefault(split, {})[name] = {"accuracy": one.accuracy, "n": one.n, "p": one.p}
        print_json(table)
        return
    rows = [
        (split, name, f"{one.accuracy:.1f}", one.n, f"{one.p:.3f}", _verdict(one.p, tests))
        for split, name, one in found
    ]
    columns = ("split", "category", "accuracy %", "n", "p", "")
    print_table(columns, rows, right=columns[2:5])
    out().print(
        f"two-sided exact test at {LEVEL:.0%}, corrected for {tests} tests (Bonferroni)",
        soft_wrap=True,
    )


@command.command()
def fetch(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder.")],
    style: Annotated[
        list[str] | None,
        typer.Option(
            "--style",
            metavar="STYLE",
            help="noto, twemoji, fluent or openmoji (default: all). May be repeated.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Build the full atlas from the vendors' npm packages.

    Your npm downloads about 150 MB; every package is verified before it is read.
    """
    from mmmamba_evals.scenes.atlas_download import fetch as fetch_atlases
    from mmmamba_evals.scenes.atlas_download import pinned_packages

    with if_interrupted(
        f"styles that are complete stay in {folder}; fetch the others with --style"
    ):
        fetch_atlases(folder, style, overwrite=overwrite, say=lambda text: err().print(text))
    first = folder / (style[0] if style else next(iter(pinned_packages())))
    build_with_it = ("scenes", "build", "--atlas", first, "--out", free_folder(SCENES_FOLDER))
    NextSteps((command_line(*build_with_it),)).print()


def _verdict(p: float, tests: int) -> str:
    from mmmamba_evals.scenes.blind_baseline import LEVEL

    return "can be guessed" if p < LEVEL / max(1, tests) else "no better than a coin"


def _open(folders: list[Path] | None, style: str) -> tuple[Atlas, World]:
    from mmmamba_evals.scenes.atlas import merge_atlases, open_atlas
    from mmmamba_evals.scenes.fonts import SEEN, UNSEEN, fonts_of
    from mmmamba_evals.scenes.shipped import UNSEEN_STYLE, shipped_atlas
    from mmmamba_evals.scenes.world import make_world

    if folders:
        atlas = merge_atlases([open_atlas(folder) for folder in folders])
        return atlas, make_world(atlas, fonts_of(SEEN))
    atlas = shipped_atlas(style)
    return atlas, make_world(atlas, fonts_of(UNSEEN if style == UNSEEN_STYLE else SEEN))
