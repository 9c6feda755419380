"""All stages that are wanted, one after the other, with the layer plan put in where it belongs."""

from __future__ import annotations

from collections.abc import Sequence

from mmmamba_cli.distill.stage_attempt import OverwriteLog, command_digest
from mmmamba_cli.distill.stage_runner import TRAINING, Options, Watch, run_stage
from mmmamba_cli.distill.stages import choose_start, stages_to_run
from mmmamba_cli.distill.trainer import Stopped
from mmmamba_cli.distill.training_state import data_digests
from mmmamba_cli.distributed import World
from mmmamba_cli.hybridize import hybridize, planned_name
from mmmamba_cli.recipe import Recipe, attention_layers, dump_recipe
from mmmamba_cli.runs import Manifest, Run


def distill(
    run: Run,
    recipe: Recipe,
    world: World,
    watch: Watch,
    *,
    wanted: Sequence[str] | None = None,
    start: str | None = None,
    options: Options | None = None,
) -> list[Manifest]:
    """Run the wanted stages of the recipe, or all that are missing; returns their products.

    Starts from product `start`, or chooses it (`choose_start`). Before the first stage with
    `layers: planned`, a student without attention gets the attention layers of the recipe's plan.
    The caller holds the run's lock. See `run_stage` for what is raised.
    """
    options = options or Options()
    names = None if wanted is None else tuple(wanted)
    product = world.on_main(lambda: choose_start(run, recipe, names, start))
    watch.say(f"starting from {product.name} ({product.kind})")
    stages = stages_to_run(recipe, product, names)
    digests = world.on_main(lambda: data_digests(recipe.data))
    log = None
    if options.overwrite or options.restart:
        command = command_digest(recipe, stages, product, digests)
        log = world.on_main(lambda: OverwriteLog(run, TRAINING, command, options.restart))
    made: list[Manifest] = []
    for stage in stages:
        if made and world.any(watch.wants_to_stop()):
            raise Stopped
        if stage.layers == "planned" and not product.attention_layers:
            product = _apply_plan(run, product, recipe, world, options, watch)
        product = run_stage(run, product, recipe, stage, world, options, watch, digests, log)
        made.append(product)
    if log is not None and world.is_main:
        log.remove()
    return made


def _apply_plan(
    run: Run, product: Manifest, recipe: Recipe, world: World, options: Options, watch: Watch
) -> Manifest:
    """The hybrid of the recipe's plan, made now or before; the product itself for a linear plan."""
    layers = attention_layers(recipe.layers, product.num_layers)
    if not layers:
        return product
    name = planned_name(recipe, layers, product.num_layers)

    def make() -> Manifest:
        known = run.products().get(name)
        parents = () if known is None else [p.content_hash for p in known.parents]
        if known is not None and product.content_hash in parents:
            return known
        watch.say(f"putting the teacher's attention back into {len(layers)} layers: {name}")
        return hybridize(
            run,
            product,
            layers,
            name,
            teacher_path=options.teacher,
            overwrite=options.overwrite or options.restart,
            recipe=dump_recipe(recipe),
        )

    return world.on_main(make)
