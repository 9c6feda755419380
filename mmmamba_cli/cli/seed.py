"""`mmmamba seed`: initialize a linear student from a trained teacher."""

from __future__ import annotations

import json
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

if TYPE_CHECKING:
    from mmmamba_cli.checkpoint import Checkpoint
    from mmmamba_cli.recipe import Recipe
    from mmmamba_cli.runs import Manifest, Run
    from mmmamba_cli.seed import LayerFidelity


def command(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="HoVLE folder, .safetensors, or .ckpt/.pt/.bin state dict; or a Llama, Qwen2, "
            "Qwen3 or InternLM2 as a folder or .gguf file. OWNER/NAME is found on the Hub.",
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
    from mmmamba_cli.checkpoint import open_checkpoint, parse_dtype
    from mmmamba_cli.checkpoint.model_loader import recommended_settings
    from mmmamba_cli.recipe import load_recipe
    from mmmamba_cli.runs import Run
    from mmmamba_cli.seed import seed_student

    overrides: dict[str, Any] = {"teacher": str(checkpoint)}
    overrides |= {} if init is None else {"mixer.init": init}
    overrides |= {} if seed is None else {"seed": seed}
    loaded = load_recipe(recipe, sets or (), overrides)
    target, wanted = Run(run), parse_dtype(dtype)
    teacher = open_checkpoint(checkpoint, config_file=config, tokenizer_file=tokenizer, arch=arch)
    _print_warnings(teacher)
    carried, left_out = recommended_settings(teacher)
    if left_out:
        print_warning(
            f"{teacher.path} recommends settings of a generation that a student has no use for: "
            f"{', '.join(left_out)}"
        )
    made = False

    def status() -> str:
        if made:
            return (
                f"the seed is complete in {target.product_folder('seed')}; only its comparison "
                "with the teacher is not written"
            )
        return f"nothing was written to {run}; repeat the command"

    with if_interrupted(status), target.lock():
        before = [name for name in target.products() if name != "seed"]
        with progress("seeding", _num_student_bytes(teacher, loaded, wanted), "B") as advance:
            manifest = seed_student(
                target,
                teacher,
                loaded,
                dtype=wanted,
                overwrite=overwrite,
                discard=discard,
                config_file=config,
                arch=arch,
                advance=advance,
            )
        made = True
        rows = _fidelity(target, teacher, calibration) if report else []
    if before:
        print_warning(f"removed from {target.folder}: {', '.join(before)}")
    if carried and not as_json:
        settings = ", ".join(f"{name} {value}" for name, value in carried.items())
        print_line(f"`generate` of the student takes from the teacher: {settings}", to_stderr=True)
    _print_result(target, manifest, rows, as_json)


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
    from mmmamba_cli.checkpoint import atomic_write_text
    from mmmamba_cli.runs import open_processor
    from mmmamba_cli.seed import built_in_calibration, measure_fidelity, read_calibration

    processor = open_processor(teacher)
    batch = built_in_calibration(teacher.config, processor)
    if file is not None:
        batch = read_calibration(file, processor)
    with progress("comparing mixers", teacher.config.num_hidden_layers, "layers") as advance:
        rows = measure_fidelity(teacher, run.open_product("seed"), batch, advance)
    text = json.dumps([vars(row) for row in rows], indent=2) + "\n"
    atomic_write_text(run.product_folder("seed") / "fidelity.json", text)
    return rows


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
