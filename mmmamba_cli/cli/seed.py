"""`mmmamba seed`: initialize a linear student from a trained teacher."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.console import (
    if_interrupted,
    print_json,
    print_line,
    print_table,
    print_text,
    print_warning,
    progress,
)
from mmmamba_cli.cli.next_steps import steps_after
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Overwrite,
    RunFolder,
    Sets,
    complete_recipes,
)
from mmmamba_cli.errors import CheckpointError, MmmambaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmmamba_cli.checkpoint import (
        AnyCheckpoint,
        Checkpoint,
        InPlaceCheckpoint,
        TensorHasher,
    )
    from mmmamba_cli.recipe import Recipe
    from mmmamba_cli.runs import Manifest, Run
    from mmmamba_cli.seed import LayerFidelity


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="HoVLE folder, .safetensors, or .ckpt/.pt/.bin state dict; a Llama, Qwen2, "
            "Qwen3 or InternLM2 as a folder or .gguf file; or the folder of another model of "
            "transformers, such as Qwen3-VL. OWNER/NAME is found on the Hub.",
        ),
    ],
    run: RunFolder = DEFAULT_RUN,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", metavar="RECIPE", help="Recipe of the run.", autocompletion=complete_recipes
        ),
    ] = "mmmamba-linear",
    sets: Sets = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="INIT",
            help="scratch, inherit, inherit+mimic, or calibrated on data.train (experimental) "
            "(default: the recipe's).",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="config.json of a bare state dict.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="tokenizer.model of a bare state dict.")
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Architecture of a state dict without config, such as hovle-2.6b."
        ),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Keep transformers' class for a language model too, with mixers in the place of "
            "its attention (always so for other teachers than HoVLE).",
        ),
    ] = False,
    allow_bidirectional: Annotated[
        bool,
        typer.Option(
            "--allow-bidirectional",
            help="Convert a teacher whose image tokens attend in both directions (Gemma 3).",
        ),
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Dtype of the student: bf16, fp16 or fp32.")
    ] = "bf16",
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of new parameters (default: the recipe's)."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Compare each mixer with its teacher.")
    ] = True,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON Lines of questions and images for the report."),
    ] = None,
    overwrite: Overwrite = False,
    discard: Annotated[
        bool,
        typer.Option(
            "--discard",
            help="With --overwrite: also remove the run's other products, which lose their parent.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run: seed a linear student from a trained teacher."""
    from mmmamba_cli.checkpoint import Checkpoint, parse_dtype_name
    from mmmamba_cli.recipe import load_recipe
    from mmmamba_cli.runs import Run

    overrides: dict[str, Any] = {"teacher": str(checkpoint)}
    overrides |= {} if init is None else {"mixer.init": init}
    overrides |= {} if seed is None else {"seed": seed}
    loaded = load_recipe(recipe, sets or (), overrides)
    target, wanted = Run(run), parse_dtype_name(dtype)
    teacher = _open_teacher(checkpoint, config, tokenizer, arch, in_place)
    from mmmamba_cli.checkpoint import TensorHasher, parse_dtype

    with TensorHasher() as hasher:
        # Before the libraries of the model are imported, which takes seconds.
        hasher.submit_ahead(teacher.source)
        arguments = SeedArguments(loaded, parse_dtype(wanted), overwrite, discard, hasher)
        job = (
            _holistic_job(target, teacher, arguments, config, arch)
            if isinstance(teacher, Checkpoint)
            else _in_place_job(target, teacher, arguments, allow_bidirectional)
        )
        _run_job(target, job, report, calibration, as_json)


def _run_job(run: Run, job: SeedJob, report: bool, calibration: Path | None, as_json: bool) -> None:
    """Seed under the lock of the run, compare the mixers if `report`, and print the result."""
    from mmmamba_cli.seed.fidelity import read_samples

    if report and calibration is not None:
        # What cannot be read is found before anything is written.
        read_samples(calibration)
    made = False

    def status() -> str:
        if made:
            return (
                f"the seed is complete in {run.product_folder('seed')}; only its comparison "
                "with the teacher is not written"
            )
        return f"nothing was written to {run.folder}; repeat the command"

    with if_interrupted(status), run.lock():
        before = [name for name in run.products() if name != "seed"]
        with progress("seeding", job.nbytes, "B") as advance:
            manifest = job.seed(advance)
        made = True
        rows = job.compare(calibration) if report else []
    if before:
        print_warning(f"removed from {run.folder}: {', '.join(before)}")
    if job.note is not None and not as_json:
        print_line(job.note, to_stderr=True)
    _print_result(run, manifest, rows, as_json)


@dataclass(frozen=True)
class SeedArguments:
    """Arguments of `seed_student` and of `seed_in_place`."""

    recipe: Recipe
    dtype: Any
    overwrite: bool
    discard: bool
    hasher: TensorHasher


@dataclass(frozen=True)
class SeedJob:
    """A seed of one kind of teacher: bytes to write, its writer, and the report on its mixers.

    `compare` takes the file of --calibration. `note` is printed at the end.
    """

    nbytes: int
    seed: Callable[[Callable[[int], None]], Manifest]
    compare: Callable[[Path | None], list[LayerFidelity]]
    note: str | None = None


def _open_teacher(
    path: Path, config: Path | None, tokenizer: Path | None, arch: str | None, in_place: bool
) -> AnyCheckpoint:
    from mmmamba_cli.checkpoint import open_any_checkpoint, open_checkpoint

    if config is None and tokenizer is None and arch is None:
        return open_any_checkpoint(path, in_place=in_place)
    if in_place:
        raise CheckpointError(
            "--in-place reads config and tokenizer from the teacher's folder",
            "leave out --config, --tokenizer and --arch",
        )
    return open_checkpoint(path, config_file=config, tokenizer_file=tokenizer, arch=arch)


def _holistic_job(
    run: Run,
    teacher: Checkpoint,
    arguments: SeedArguments,
    config: Path | None,
    arch: str | None,
) -> SeedJob:
    """The seed of HoVLE, or of a language model of the fast path."""
    from mmmamba_cli.checkpoint.model_loader import recommended_settings
    from mmmamba_cli.seed import seed_student

    _print_warnings(teacher)
    carried, left_out = recommended_settings(teacher)
    if left_out:
        print_warning(
            f"{teacher.path} recommends settings of a generation that a student has no use for: "
            f"{', '.join(left_out)}"
        )
    settings = ", ".join(f"{name} {value}" for name, value in carried.items())
    return SeedJob(
        nbytes=_num_student_bytes(teacher, arguments.recipe, arguments.dtype),
        seed=lambda advance: seed_student(
            run,
            teacher,
            config_file=config,
            arch=arch,
            advance=advance,
            **vars(arguments),
        ),
        compare=lambda file: _fidelity(run, teacher, file),
        note=f"`generate` of the student takes from the teacher: {settings}" if carried else None,
    )


def _in_place_job(
    run: Run,
    teacher: InPlaceCheckpoint,
    arguments: SeedArguments,
    allow_bidirectional: bool,
) -> SeedJob:
    """The seed of a model of transformers, with mixers in the place of its attention."""
    from mmmamba_cli.checkpoint.prompt_files import TEMPLATE, missing_chat_files
    from mmmamba_cli.seed import seed_in_place, seed_in_place_bytes
    from mmmamba_cli.teachers import bidirectional_warning

    nbytes = seed_in_place_bytes(
        teacher, arguments.recipe, arguments.dtype, allow_bidirectional=allow_bidirectional
    )
    warning = bidirectional_warning(teacher.config)
    if warning is not None:
        print_warning(warning)
    for name in missing_chat_files(teacher):
        given = "texts" if name == TEMPLATE else "token ids"
        print_warning(
            f"{teacher.path} has no {name}: the student can be loaded and given {given}, but "
            "neither conversations nor pictures"
        )
    return SeedJob(
        nbytes=nbytes,
        seed=lambda advance: seed_in_place(
            run,
            teacher,
            allow_bidirectional=allow_bidirectional,
            advance=advance,
            **vars(arguments),
        ),
        compare=lambda file: _in_place_fidelity(run, teacher, file),
    )


def _print_warnings(teacher: Checkpoint) -> None:
    if teacher.assumed:
        print_warning(
            f"{teacher.path} has no config; believed without a check: {', '.join(teacher.assumed)}"
        )
    if teacher.tokenizer_file is None:
        print_warning(
            f"{teacher.path} has no tokenizer beside it: the student can be trained and "
            "loaded, but not asked anything (give --tokenizer FILE)"
        )


def _num_student_bytes(teacher: Checkpoint, recipe: Recipe, dtype: Any) -> int:
    from mmmamba_cli.architecture import parameter_shapes
    from mmmamba_cli.checkpoint import tensor_plan
    from mmmamba_cli.seed import student_config

    shapes = parameter_shapes(student_config(teacher.config, recipe))
    kept = {n: s for n, s in teacher.shapes.items() if n.startswith("unused.")}
    return sum(info.nbytes for info in tensor_plan({**shapes, **kept}, dtype).values())


def _fidelity(run: Run, teacher: Checkpoint, file: Path | None) -> list[LayerFidelity]:
    """Measure the fidelity of each mixer and write it beside the product's weights."""
    from mmmamba_cli.runs import open_processor
    from mmmamba_cli.seed import built_in_calibration, measure_fidelity, read_calibration

    processor = open_processor(teacher)
    batch = built_in_calibration(teacher.config, processor)
    if file is not None:
        batch = read_calibration(file, processor)
    with progress("comparing mixers", teacher.config.num_hidden_layers, "layers") as advance:
        rows = measure_fidelity(teacher, run.open_product("seed"), batch, advance)
    _write_fidelity(run, rows)
    return rows


def _in_place_fidelity(
    run: Run, teacher: InPlaceCheckpoint, file: Path | None
) -> list[LayerFidelity]:
    """`_fidelity` of a transformers model; empty with a warning where it cannot be measured."""
    from mmmamba_cli.checkpoint import InPlaceCheckpoint, load_in_place_processor
    from mmmamba_cli.devices import OutOfMemory
    from mmmamba_cli.seed.in_place_fidelity import (
        in_place_calibration,
        measure_in_place_fidelity,
    )

    student = run.open_any_product("seed")
    assert isinstance(student, InPlaceCheckpoint)
    try:
        processor = load_in_place_processor(teacher)
        if processor is None:
            return []
        batches = in_place_calibration(teacher, processor, file)
        total = len(batches) * (student.num_layers - len(student.attention_layers))
        with progress("comparing mixers", total, "layers") as advance:
            rows = measure_in_place_fidelity(teacher, student, batches, advance)
    except (MmmambaError, OutOfMemory) as error:
        # The seed is complete.
        print_warning(f"the mixers were not compared with the teacher: {error}")
        return []
    _write_fidelity(run, rows)
    return rows


def _write_fidelity(run: Run, rows: list[LayerFidelity]) -> None:
    from mmmamba_cli.checkpoint import atomic_write_text

    text = json.dumps([vars(row) for row in rows], indent=2) + "\n"
    atomic_write_text(run.product_folder("seed") / "fidelity.json", text)


def _print_result(run: Run, manifest: Manifest, rows: list[LayerFidelity], as_json: bool) -> None:
    product = run.product_folder(manifest.name)
    if as_json:
        print_json(
            {
                "run": str(run.folder),
                "product": manifest.model_dump(mode="json"),
                "folder": str(product),
                "fidelity": [vars(row) for row in rows],
            }
        )
        return
    if rows:
        print_table(
            ("layer", "cosine", "relative MSE"),
            [(r.layer, f"{r.cosine:.4f}", f"{r.relative_mse:.4f}") for r in rows],
            title="Mixer output before W_O against the teacher's, untrained",
            right=("layer", "cosine", "relative MSE"),
        )
    print_text(f"{manifest.num_layers} layers seeded: {product}")
    steps_after(run, manifest).print()
