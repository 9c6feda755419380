"""`distill`: run the stages of a recipe in order, and apply its layer plan between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mmmamba_cli.architecture import LINEAR, mixer_spec
from mmmamba_cli.distill.stage_attempt import DistillOptions, OverwriteLog, command_digest
from mmmamba_cli.distill.stage_models import seeded_mixers
from mmmamba_cli.distill.stage_runner import (
    TRAINING_FOLDER,
    StageCallbacks,
    StageContext,
    run_stage,
)
from mmmamba_cli.distill.trainer import Stopped
from mmmamba_cli.distill.training_settings import stage_digests
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import RecipeError, RunError
from mmmamba_cli.hybridize import LayerSelection, hybridize, planned_product_name
from mmmamba_cli.recipe import (
    Recipe,
    Stage,
    attention_layers,
    dump_recipe,
    layer_mixers,
    mixer_options,
)
from mmmamba_cli.runs import Manifest, Run

# From a run, the recipe and a student without attention: its attention layers by measurement.
SelectLayers = Callable[[Run, Recipe, Manifest], LayerSelection]


def distill(
    run: Run,
    recipe: Recipe,
    world: World,
    callbacks: StageCallbacks,
    *,
    wanted: Sequence[str] | None = None,
    start: str | None = None,
    options: DistillOptions | None = None,
    select: SelectLayers | None = None,
) -> list[Manifest]:
    """Run the stages `wanted`, or all that are not done yet; return their products.

    The first stage starts from product `start`, or from `choose_start_product`. Before the first
    stage with `layers: planned`, a student without attention gets the attention layers of the
    recipe's plan, which `select` measures if the recipe has `layers.select`. The caller holds the
    lock of the run. Raises what `run_stage` raises.
    """
    options = options or DistillOptions()
    names = None if wanted is None else tuple(wanted)
    product = world.run_on_main(lambda: choose_start_product(run, recipe, names, start))
    world.run_on_main(lambda: check_mixers(run, recipe, product))
    callbacks.log(f"starting from {product.name} ({product.kind})")
    stages = stages_to_run(recipe, product, names)
    check_plan(recipe, product, stages)
    digests = world.run_on_main(lambda: stage_digests(recipe, stages))
    log = None
    if options.overwrite or options.restart:
        command = command_digest(recipe, stages, product, digests)
        folder = run.folder / TRAINING_FOLDER
        log = world.run_on_main(lambda: OverwriteLog(folder, command, options.restart))
    context = StageContext(run, recipe, world, options, callbacks, overwrite_log=log)
    made: list[Manifest] = []
    for stage in stages:
        if made and world.any(callbacks.should_stop()):
            raise Stopped
        if stage.layers == "planned" and not product.attention_layers:
            product = _apply_plan(context, product, select)
        product = run_stage(replace(context, digests=digests[stage.name]), product, stage)
        made.append(product)
    if log is not None and world.is_main:
        log.remove()
    return made


def _apply_plan(context: StageContext, product: Manifest, select: SelectLayers | None) -> Manifest:
    """Return the hybrid of the recipe's plan, made now or earlier; `product` for a linear plan."""
    run, recipe, options = context.run, context.recipe, context.options
    layers = attention_layers(recipe.layers, product.num_layers)
    if not layers:
        return product
    # The same for all choices of this many layers.
    name = planned_product_name(recipe, layers)
    measure = recipe.layers.select is not None
    if measure and (select is None or context.world.size > 1):
        raise RunError(
            f"the recipe chooses layers by {recipe.layers.select}, which one process measures",
            f"run `mmmamba hybridize --run {run.folder}` first, and start again",
        )

    def make() -> Manifest:
        known = run.products().get(name)
        parents = () if known is None else [p.content_hash for p in known.parents]
        if known is not None and product.content_hash in parents:
            return known
        selection = select(run, recipe, product) if measure and select is not None else None
        context.callbacks.log(f"restoring the teacher's attention in {len(layers)} layers: {name}")
        return hybridize(
            run,
            product,
            layers if selection is None else selection.layers,
            name,
            teacher_path=options.teacher,
            overwrite=options.overwrite or options.restart,
            recipe=dump_recipe(recipe),
            selection=selection,
        )

    return context.world.run_on_main(make)


def parse_stage_names(recipe: Recipe, text: str | None) -> tuple[str, ...] | None:
    """Parse `--stage`: stage names and numbers with commas, "stage3" or "1,2"; None for None.

    Raises:
        RunError: the recipe has no such stage, or the stages do not follow one another.
    """
    if text is None:
        return None
    names = [stage.name for stage in recipe.stages]
    chosen: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        by_number = part.isdecimal() and part not in names and 1 <= int(part) <= len(names)
        name = names[int(part) - 1] if by_number else part
        if name not in names:
            raise RunError(
                f"--stage {part!r}: the recipe has no such stage, it has {', '.join(names)}",
                "give names, or numbers counted from 1, with commas",
            )
        chosen.append(name)
    first = names.index(chosen[0])
    if chosen != names[first : first + len(chosen)]:
        raise RunError(
            f"--stage {text!r}: stages are run in the recipe's order: {', '.join(names)}",
            "give stages that follow one another, in that order",
        )
    return tuple(chosen)


def choose_start_product(
    run: Run, recipe: Recipe, wanted: tuple[str, ...] | None, named: str | None
) -> Manifest:
    """Choose the product that the first stage starts from.

    It is the product `named`, or the current product if the first wanted stage is its next one, or
    else the newest product for which this holds, preferably an ancestor of the current one.

    Raises:
        RunError: a stage before the first wanted one has not been run.
    """
    names = [stage.name for stage in recipe.stages]
    current = run.product(named or run.record.current)
    _check_stages_done(current, names)
    if wanted is None:
        if len(current.stages) == len(names):
            raise RunError(
                f"nothing is left to do: product {current.name!r} has been through all stages of "
                "its recipe",
                f"repeat one with --stage {names[-1]} --overwrite, or start from another product "
                "with --from",
            )
        return current
    before = tuple(names[: names.index(wanted[0])])
    if current.stages == before:
        return current
    if named is None:
        ready = [p for p in run.products().values() if p.stages == before]
        ancestors = {current.name, *(product.name for _, product in run.ancestors(current))}
        ready = [p for p in ready if p.name in ancestors] or ready
        if ready:
            return ready[-1]
    has = ", ".join(current.stages) or "no stage"
    raise RunError(
        f"stage {wanted[0]} starts from a product that has done "
        f"{', '.join(before) or 'no stage'}; {current.name!r} has done {has}",
        f"run `mmmamba distill --stage {','.join(before)}` first"
        if len(before) > len(current.stages)
        else "name another product with --from",
    )


def check_mixers(run: Run, recipe: Recipe, product: Manifest) -> None:
    """Check that the linear layers of a product have the mixers of the recipe, and their options.

    Both are chosen at seeding; a recipe that names others would describe another student.

    Raises:
        RecipeError: a layer with another mixer, a layer of the recipe that the product lacks, or
            another value of an option that the product's mixers read.
    """
    seeded, options = seeded_mixers(run.open_any_product(product.name))
    specs = [mixer_spec(name) for name in seeded]
    mixers = layer_mixers(recipe.mixer.kind, recipe.layers.mixers, len(seeded))
    for layer, (wanted, found) in enumerate(zip(mixers, seeded, strict=True)):
        if specs[layer].layer_type == LINEAR and wanted != found:
            raise RecipeError(
                f"the recipe gives layer {layer} the mixer {wanted}, but in {product.name!r} it "
                f"has {found}",
                "seed another --run with this recipe, or give mixer.kind and layers.mixers as "
                "they were at seeding",
            )
    wanted_options = mixer_options(recipe.mixer)
    for option in sorted({o for spec in specs if spec.layer_type == LINEAR for o in spec.options}):
        value, at_seeding = getattr(wanted_options, option), getattr(options, option)
        if value != at_seeding:
            raise RecipeError(
                f"mixer.{option}: is {value}, but {product.name!r} was seeded with {at_seeding}",
                "seed another --run with this recipe, or give the option as it was at seeding",
            )


def check_plan(recipe: Recipe, product: Manifest, stages: Sequence[Stage]) -> None:
    """Check the recipe's layer plan before `stages` start from `product`.

    Raises:
        RecipeError: the model does not have the layers of the plan.
        RunError: the product is linear after a stage that the recipe trains with attention.
    """
    if product.attention_layers or all(stage.layers != "planned" for stage in stages):
        return
    layers = attention_layers(recipe.layers, product.num_layers)
    planned = [stage.name for stage in recipe.stages if stage.layers == "planned"]
    done = [name for name in planned if name in product.stages]
    if layers and done:
        raise RunError(
            f"the recipe trains {done[0]} with attention in {len(layers)} layers, but "
            f"{product.name!r} has done it without",
            f"repeat it with `--stage {','.join(planned)}`, or go on without attention with "
            "--set layers.attention=0",
        )


def stages_to_run(
    recipe: Recipe, start: Manifest, wanted: tuple[str, ...] | None
) -> tuple[Stage, ...]:
    """The wanted stages, or all that `start` has not done."""
    if wanted is not None:
        return tuple(stage for stage in recipe.stages if stage.name in wanted)
    return recipe.stages[len(start.stages) :]


def _check_stages_done(product: Manifest, names: Sequence[str]) -> None:
    done = list(product.stages)
    if done != list(names[: len(done)]):
        raise RunError(
            f"product {product.name!r} has done {', '.join(done)}, which is not how the recipe "
            f"begins: {', '.join(names)}",
            "take the recipe it was made with, or start from another product with --from",
        )
