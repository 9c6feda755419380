"""The commands that follow a command, as lines to paste into a shell."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmmamba_cli.cli.console import print_text
from mmmamba_cli.cli.options import DEFAULT_RUN

if TYPE_CHECKING:
    from mmmamba_cli.checkpoint import AnyCheckpoint
    from mmmamba_cli.recipe import Recipe
    from mmmamba_cli.runs import Manifest, Run

PREFIX = "next: "
# Models of composed scenes ship under names that begin so. Their data are drawn, not downloaded.
SCENES_MODELS = "scenes-"
SCENES_SUITE = "scenes"
SHIPPED_STUDENT = "scenes-linear"
SCENES_FOLDER = Path("scenes")
LESSONS = "lessons.jsonl"
# The stages of the default recipe are meant for billions of parameters on GPUs.
DEFAULT_RECIPE, SMALL_RECIPE = "mmmamba-linear", "scenes-demo"
PICTURE_SUITES = ("mme", "pope")
ATTENTION_SHARE = 4


@dataclass(frozen=True)
class NextSteps:
    """Commands in their order, and remarks on placeholders in them."""

    commands: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def print(self) -> None:
        """Print the commands, one a line, the first after `next: `, and the remarks below."""
        for number, line in enumerate(self.commands):
            print_text(f"{PREFIX if number == 0 else ' ' * len(PREFIX)}{line}")
        for line in self.remarks:
            print_text(line)


@dataclass(frozen=True)
class GivenOptions:
    """Options of a command that the next command may need too: runs do not record them."""

    teacher: Path | None = None
    device: str | None = None


def default_run() -> Path:
    """The run directory of commands without --run."""
    return Path(os.environ.get("MMMAMBA_RUN") or DEFAULT_RUN)


def command_line(*words: str | Path, run: Path | None = None) -> str:
    """`mmmamba WORDS`, quoted for a shell, with `--run` unless the run is found without it."""
    chosen = () if run is None or run == default_run() else ("--run", run)
    return shlex.join(["mmmamba", *map(str, words), *map(str, chosen)])


def steps_after(
    run: Run,
    product: Manifest,
    given: GivenOptions = GivenOptions(),
    lessons: Path | None = None,
) -> NextSteps:
    """What to do with a product: train it while stages are left, else evaluate it.

    `lessons` are conversations that were just written, for a run without training data.
    """
    from mmmamba_cli.recipe import parse_recipe

    recipe = parse_recipe(product.recipe, f"recipe of {product.name}")
    done = len(product.stages) == len(recipe.stages)
    if product.final is not False or done or run.record.teacher is None:
        return _evaluation(run, product, given)
    return _without_prompts(run, product) or _training(run, product, recipe, given, lessons)


def _without_prompts(run: Run, product: Manifest) -> NextSteps | None:
    """To seed again, for a student whose teacher's folder lacks files that make prompts."""
    if not run.is_in_place:
        return None
    from mmmamba_cli.checkpoint import InPlaceCheckpoint
    from mmmamba_cli.checkpoint.prompt_files import FILES_OF, missing_chat_files

    student = run.open_any_product(product.name)
    missing = missing_chat_files(student) if isinstance(student, InPlaceCheckpoint) else []
    if not missing:
        return None
    teacher = run.teacher.path
    return NextSteps(
        (command_line("seed", teacher, "--overwrite", run=run.folder),),
        (
            f"first add the {missing[0]} ({FILES_OF[missing[0]]}) to {teacher}: without it no "
            "conversation can be trained on",
        ),
    )


def is_of_scenes(run: Run, product: Manifest) -> bool:
    """Whether the teacher, or the origin of an imported student, is a shipped model of scenes."""
    from mmmamba_cli.checkpoint.model_names import public_model_name

    teacher = run.record.teacher
    names = [public_model_name(teacher.path)] if teacher is not None else []
    names += [parent.name for parent in product.parents if parent.role == "origin"]
    return any(name is not None and name.startswith(SCENES_MODELS) for name in names)


def steps_after_drawing(run: Run, folder: Path, lessons: Path | None) -> NextSteps:
    """What to do with a suite, and maybe lessons, that were just drawn into `folder`.

    A student of scenes with stages left is trained; a finished product is evaluated; without a run
    a shipped student is.
    """
    from mmmamba_cli.errors import MmmambaError

    words: list[str | Path] = ["eval", "--suite", SCENES_SUITE, "--data", folder]
    shipped = NextSteps((command_line(*words, "--model", SHIPPED_STUDENT),))
    try:
        product = run.product(run.record.current)
        if product.final is False:
            may_learn = lessons is not None and is_of_scenes(run, product)
            return steps_after(run, product, lessons=lessons) if may_learn else shipped
        teacher = [] if run.record.teacher is None else ["--teacher"]
    except MmmambaError:
        # There is no run here, or none that can be read.
        return shipped
    return NextSteps((command_line(*words, *teacher, run=run.folder),))


def free_folder(name: Path) -> Path:
    """The name, or name-2, name-3, ... if there is something of that name."""
    number, found = 1, name
    while found.exists():
        number += 1
        found = name.with_name(f"{name.name}-{number}")
    return found


def _training(
    run: Run, product: Manifest, recipe: Recipe, given: GivenOptions, lessons: Path | None
) -> NextSteps:
    words: list[str | Path] = ["distill"]
    before: list[str] = []
    remarks: list[str] = []
    if recipe.data.train is None:
        if lessons is None and is_of_scenes(run, product):
            lessons = SCENES_FOLDER / LESSONS
            if not lessons.is_file():
                folder = free_folder(SCENES_FOLDER)
                before.append(command_line("scenes", "build", "--out", folder))
                lessons = folder / LESSONS
        if lessons is None:
            remarks.append(
                "FILE: conversations to train on, as `mmmamba data check FILE` reads them"
            )
        words += ["--data", lessons or "FILE"]
        if lessons is not None and _is_too_long(recipe):
            words += ["--recipe", SMALL_RECIPE]
    words += _moved_teacher(run, given, "--teacher")
    words += [] if given.device is None else ["--device", given.device]
    commands = [*before, command_line(*words, run=run.folder)]
    if _is_ready_for_hybrid(product, recipe):
        count = max(1, product.num_layers // ATTENTION_SHARE)
        hybrid: list[str | Path] = ["hybridize", "--attn-layers", str(count)]
        hybrid += _moved_teacher(run, given, "--teacher")
        remarks.append(f"or a hybrid first: {command_line(*hybrid, run=run.folder)}")
    return NextSteps(tuple(commands), tuple(remarks))


def _moved_teacher(run: Run, given: GivenOptions, option: str) -> list[str | Path]:
    """The option that names the teacher, if it is no longer where the run found it."""
    known = run.record.teacher
    if given.teacher is None or known is None or Path(known.path).exists():
        return []
    return [option, given.teacher]


def _is_too_long(recipe: Recipe) -> bool:
    """Whether the stages are those of the default recipe, and the mixers fit the small one."""
    from mmmamba_cli.recipe import load_recipe

    small = load_recipe(SMALL_RECIPE)
    same_mixers = (recipe.mixer, recipe.layers.mixers) == (small.mixer, small.layers.mixers)
    return same_mixers and recipe.stages == load_recipe(DEFAULT_RECIPE).stages


def _is_ready_for_hybrid(product: Manifest, recipe: Recipe) -> bool:
    """Whether a linear student has done the stages of all layers, and no plan adds attention."""
    whole = tuple(stage.name for stage in recipe.stages if stage.layers == "all")
    is_linear = not product.attention_layers and not recipe.layers.attention
    return bool(whole) and product.stages == whole and is_linear


def _evaluation(run: Run, product: Manifest, given: GivenOptions) -> NextSteps:
    from mmmamba_cli.runs import resolve_product

    teacher = [] if run.record.teacher is None else ["--teacher"]
    path = _moved_teacher(run, given, "--teacher-path")
    found = resolve_product(run, product.name)
    words: Sequence[str | Path]
    remarks: tuple[str, ...] = ()
    if not _takes_prompts(found.opened):
        words = ["profile"] if teacher else ["profile", "--no-teacher"]
        return NextSteps((command_line(*words, *path, run=run.folder),))
    if is_of_scenes(run, product):
        words = ["eval", "--suite", SCENES_SUITE]
    elif not found.has_vision:
        words = ["chat"]
    else:
        words, remarks = _picture_suites()
    return NextSteps((command_line(*words, *teacher, *path, run=run.folder),), remarks)


def _takes_prompts(checkpoint: AnyCheckpoint) -> bool:
    """Whether a model's folder has the files that make prompts."""
    from mmmamba_cli.checkpoint import Checkpoint

    if isinstance(checkpoint, Checkpoint):
        return checkpoint.tokenizer_file is not None
    from mmmamba_cli.checkpoint.in_place_loader import missing_prompt_files

    return not missing_prompt_files(checkpoint)


def _picture_suites() -> tuple[list[str | Path], tuple[str, ...]]:
    """`eval` with the suites whose tables are there; without any, with a folder to be named."""
    from mmmamba_cli.evaluate.library import existing_table, find_suite

    suites = {name: find_suite(name) for name in PICTURE_SUITES}
    there = [name for name, suite in suites.items() if existing_table(suite, None) is not None]
    if there:
        return ["eval", "--suite", ",".join(there)], ()
    files = " and ".join(f"{suite.dataset}.tsv" for suite in suites.values())
    remark = f"DIR: a folder with VLMEvalKit's {files}"
    return ["eval", "--suite", ",".join(suites), "--data", "DIR"], (remark,)
