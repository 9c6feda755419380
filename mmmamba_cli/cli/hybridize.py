"""`mmmamba hybridize`: restore the teacher's attention in some layers of a student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
from mmmamba_cli.cli.kv_budget import KVBudget
from mmmamba_cli.cli.next_steps import GivenOptions, steps_after
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    MAX_SEED,
    AsJson,
    Device,
    FromParent,
    Overwrite,
    RunFolder,
    TeacherPath,
    layers_in_words,
)
from mmmamba_cli.errors import RecipeError

if TYPE_CHECKING:
    from mmmamba_cli.layer_selection import (
        BytesBudget,
        MeasuredLayers,
        SelectionCallbacks,
        SelectionOptions,
    )
    from mmmamba_cli.recipe import Recipe
    from mmmamba_cli.runs import Manifest, Run

# Defaults of `SelectionOptions`, which is imported when the command runs.
DEFAULT_SAMPLES, DEFAULT_STEPS = 128, 40


def command(
    attn_layers: Annotated[
        str | None,
        typer.Option(
            "--attn-layers",
            metavar="N|SHARE",
            help="Number of attention layers, or their share of all layers, such as 1/4.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="I,J,...", help="Indices of the attention layers, from 0 through both stacks."
        ),
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            metavar="PLACEMENT",
            help="Placement of N layers: head-interleaved (default), tail-interleaved, "
            "head-stacked or tail-stacked.",
        ),
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="Choose the layers by measurement: kl-zero, kl, recall, mse, or file:SCORES.json.",
        ),
    ] = None,
    kv_bytes: Annotated[
        str | None,
        typer.Option(
            "--kv-bytes",
            metavar="SIZE",
            help="With --select, instead of --attn-layers: memory for keys and values at --context "
            "tokens, such as 1GiB.",
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N", help="Context length of --kv-bytes, in tokens.")
    ] = None,
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy", help="Score the other layers again after each choice (kl-zero and kl)."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Conversations for --select (default: data.train of the recipe)."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Held-out conversations for the scores (default: data.held_out, then --data).",
        ),
    ] = None,
    image_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of all images (data.image_root).")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, metavar="N", help="Samples that layers are scored on.")
    ] = DEFAULT_SAMPLES,
    steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Training steps for each layer of --select kl.")
    ] = DEFAULT_STEPS,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, metavar="N", help="Seed of the choice of samples.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the choice of layers, and write no product.")
    ] = False,
    run: RunFolder = DEFAULT_RUN,
    parent: FromParent = None,
    teacher: TeacherPath = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Restore the teacher's attention in some layers of a student.

    Starts from the run's stage-2 student if there is one, else from the current product. Without
    --attn-layers or --layers the layer plan of the run's recipe is used. Scores of --select are
    stored in selection/ of the run, and an interrupted measurement resumes.
    """
    from mmmamba_cli.hybridize import choose_parent, hybridize
    from mmmamba_cli.layer_selection import SelectionOptions
    from mmmamba_cli.recipe import parse_recipe
    from mmmamba_cli.runs import Run

    target = Run(run)
    given = {"data.train": data, "data.held_out": held_out, "data.image_root": image_root}
    with (
        if_interrupted(f"no product was written to {run}; repeat the command"),
        target.lock_existing(),
    ):
        source = choose_parent(target, parent)
        budget = KVBudget.parse(kv_bytes, context)
        plan = _plan(attn_layers, layers, placement, select, source.num_layers)
        data_fields = {key: value for key, value in given.items() if value is not None}
        recipe = parse_recipe(source.recipe, f"recipe of {source.name}", (), plan)
        if not recipe.layers.attention and "layers.attention" not in plan and budget is None:
            raise RecipeError(
                f"the recipe of {source.name} plans no attention layers",
                "give their number with --attn-layers, or their indices with --layers",
            )
        measured_on = parse_recipe(source.recipe, source.name, (), {**plan, **data_fields})
        options = SelectionOptions(
            recipe.layers.select or "", samples, steps, seed, greedy, device, teacher
        )
        choice = _choose(target, source, measured_on, options, budget)
        if choice.measured is None:
            _refuse_unused_data(given)
        else:
            _show_measured(target, choice.measured, as_json)
        if dry_run:
            _print_choice(target, source, choice, as_json)
            return
        recipe_text = _recipe_text(recipe, choice, budget)
        files = target.product_folder(source.name).glob("*.safetensors")
        # About as many bytes are written as the parent has.
        nbytes = sum(file.stat().st_size for file in files)
        with progress("writing", nbytes, "B") as advance:
            manifest = hybridize(
                target,
                source,
                choice.layers,
                choice.name,
                teacher_path=teacher,
                overwrite=overwrite,
                recipe=recipe_text,
                selection=None if choice.measured is None else choice.measured.selection,
                advance=advance,
            )
    if as_json:
        _print_product(target, manifest, choice)
        return
    _print_result(target, source, manifest)
    steps_after(target, manifest, GivenOptions(teacher)).print()


@dataclass(frozen=True)
class Choice:
    """The attention layers of a hybrid and its name; `measured` if they were measured."""

    layers: tuple[int, ...]
    name: str
    measured: MeasuredLayers | None = None


def _plan(
    count: str | None,
    layers: str | None,
    placement: str | None,
    select: str | None,
    num_layers: int,
) -> dict[str, Any]:
    """The options as recipe fields. Raises `RecipeError` for options that exclude each other."""
    from mmmamba_cli.layer_selection import parse_count

    if count is not None and layers is not None:
        raise RecipeError("--attn-layers and --layers exclude each other", "give one of them")
    if layers is not None and placement is not None:
        raise RecipeError("--placement and --layers exclude each other", "give one of them")
    if select is not None and (layers is not None or placement is not None):
        other = "--layers" if placement is None else "--placement"
        raise RecipeError(f"--select and {other} exclude each other", "give one of them")
    plan: dict[str, Any] = {}
    if placement is not None:
        plan = {"layers.placement": placement, "layers.select": None}
    if select is not None:
        plan["layers.select"] = select
    if count is not None:
        plan["layers.attention"] = parse_count(count, num_layers)
    if layers is not None:
        plan["layers.select"] = None
        try:
            plan["layers.attention"] = [int(part) for part in layers.split(",") if part.strip()]
        except ValueError as error:
            raise RecipeError(
                f"--layers is {layers!r}, expected numbers of layers: 0,8,16"
            ) from error
    return plan


def _refuse_unused_data(given: Mapping[str, str | None]) -> None:
    """Raise `RecipeError` for data that are given though no layers are scored on them."""
    options = {
        "data.train": "--data",
        "data.held_out": "--held-out",
        "data.image_root": "--image-root",
    }
    for field, value in given.items():
        if value is not None:
            raise RecipeError(
                f"{options[field]} is for layers that are chosen by their scores",
                "add --select kl-zero, or leave it out",
            )


def _choose(
    run: Run,
    source: Manifest,
    recipe: Recipe,
    options: SelectionOptions,
    budget: KVBudget | None,
) -> Choice:
    """The layers of the recipe's plan, or by measurement within the budget."""
    from mmmamba_cli.hybridize import planned_product_name
    from mmmamba_cli.layer_selection import CountBudget, select_layers
    from mmmamba_cli.recipe import attention_layers

    # Refuses a number that does not fit the model.
    placed = attention_layers(recipe.layers, source.num_layers)
    if recipe.layers.select is None:
        if budget is not None or options.greedy:
            option = "--greedy" if budget is None else "--kv-bytes"
            raise RecipeError(f"{option} needs scores of the layers", "add --select kl-zero")
        return Choice(placed, planned_product_name(recipe, placed))
    if budget is None and not placed:
        raise RecipeError(
            "--select has no number of layers to choose",
            "add --attn-layers N, or --kv-bytes SIZE with --context N",
        )
    make_budget = (
        (lambda ratio: CountBudget(len(placed)))
        if budget is None
        else partial(_bytes_budget, run, source, budget)
    )
    measured = select_layers(run, source, recipe, make_budget, options, _callbacks())
    layers = measured.selection.layers
    return Choice(layers, planned_product_name(recipe, layers), measured)


def _bytes_budget(run: Run, source: Manifest, budget: KVBudget, ratio: float) -> BytesBudget:
    from mmmamba_cli.checkpoint.tensor_info import ITEMSIZES
    from mmmamba_cli.layer_selection import BytesBudget, kv_bytes_per_layer

    shape = run.open_product(source.name).architecture
    costs = kv_bytes_per_layer(shape, budget.context, ITEMSIZES[source.dtype], ratio)
    if min(costs) > budget.size:
        raise RecipeError(
            f"--kv-bytes {budget.size:,} allows no attention layer: one takes {min(costs):,} bytes "
            f"at {budget.context:,} tokens",
            "raise --kv-bytes, or lower --context",
        )
    return BytesBudget(budget.size, budget.context, costs)


def _callbacks() -> SelectionCallbacks:
    from mmmamba_cli.layer_selection import SelectionCallbacks

    return SelectionCallbacks(
        say=lambda text: print_line(text, to_stderr=True),
        progress=lambda title, total: progress(title, total, "layers"),
    )


def _recipe_text(recipe: Recipe, choice: Choice, budget: KVBudget | None) -> str:
    """The product's recipe; a budget in bytes becomes the list of its layers."""
    from mmmamba_cli.recipe import dump_recipe

    if budget is not None:
        layers = recipe.layers.model_copy(update={"attention": choice.layers, "select": None})
        recipe = recipe.model_copy(update={"layers": layers})
    return dump_recipe(recipe)


def _show_measured(run: Run, measured: MeasuredLayers, as_json: bool) -> None:
    """Print the ranking and draw it, and warn if the halves of the data disagree."""
    from mmmamba_cli.reporting.layer_scores import write_score_picture

    if not as_json:
        _print_ranking(measured)
    # Scores of the user's own lie where the user put them.
    if measured.file.is_relative_to(run.folder):
        title = f"Scores of layers by {measured.method}"
        picture = measured.file.with_suffix(".svg")
        write_score_picture(picture, title, measured.ranking, measured.selection.layers)
    if measured.agreement is not None and measured.agreement.is_low:
        print_warning(
            "the two halves of the data rank the layers differently, so the ranking is mostly "
            "chance; raise --samples"
        )


def _print_ranking(measured: MeasuredLayers) -> None:
    chosen = measured.selection.layers
    rows = [
        (
            rank,
            one.layer,
            one.stack,
            f"{one.score:.4g}",
            f"{one.error:.2g}",
            f"{one.halves[0]:.4g}",
            f"{one.halves[1]:.4g}",
            "yes" if one.layer in chosen else "",
        )
        for rank, one in enumerate(measured.ranking, start=1)
    ]
    heading = ("rank", "layer", "stack", "score", "+-", "half 1", "half 2", "chosen")
    right = [name for name in heading if name not in ("stack", "chosen")]
    print_table(heading, rows, title=f"{measured.method}: {measured.unit}", right=right)
    agreement = measured.agreement
    if agreement is not None and agreement.spearman is not None:
        print_text(f"Spearman of the rankings by both halves: {agreement.spearman:.2f}")


def _print_choice(run: Run, source: Manifest, choice: Choice, as_json: bool) -> None:
    """The choice of --dry-run."""
    if as_json:
        value = {"run": str(run.folder), "from": source.name, "product": choice.name}
        print_json({**value, "layers": choice.layers, "selection": _selection_json(choice)})
        return
    where = layers_in_words(choice.layers, source.num_layers)
    print_text(f"{choice.name} from {source.name} would have attention in {where}")


def _selection_json(choice: Choice) -> dict[str, Any] | None:
    if choice.measured is None:
        return None
    ranking = [one.model_dump(mode="json") for one in choice.measured.ranking]
    return {**choice.measured.selection.record, "unit": choice.measured.unit, "ranking": ranking}


def _print_product(run: Run, manifest: Manifest, choice: Choice) -> None:
    """The product as JSON, with the ranking if its layers were measured."""
    product = manifest.model_dump(mode="json")
    folder = str(run.product_folder(manifest.name))
    found = {"run": str(run.folder), "product": product, "folder": folder}
    measured = _selection_json(choice)
    print_json(found if measured is None else {**found, "selection": measured})


def _print_result(run: Run, source: Manifest, manifest: Manifest) -> None:
    folder = run.product_folder(manifest.name)
    where = layers_in_words(manifest.attention_layers, manifest.num_layers)
    print_text(f"from {source.name}: attention in {where}")
    print_text(f"{manifest.kind}, not yet distilled end to end: {folder}")
    print_text("its layers are swapped, not trained")
