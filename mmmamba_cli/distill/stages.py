"""A stage as a value: from the recipe's words to the loss they name.

Which stages are to be run, from which product, and what their products are called.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.layer_losses import (
    HiddenAlignment,
    LayerLoss,
    Layerwise,
    MatrixOrientation,
    MixerMSE,
)
from mmmamba_cli.distill.objective import Objective
from mmmamba_cli.errors import RecipeError, RunError
from mmmamba_cli.model import LINEAR, HolisticVLMConfig
from mmmamba_cli.recipe import KL, Recipe, Stage
from mmmamba_cli.runs import Manifest, Run

LAYER_LOSSES: dict[str, LayerLoss] = {
    "mixer-mse": MixerMSE(),
    "matrix-orientation": MatrixOrientation(),
    "hidden-alignment": HiddenAlignment(),
}


def objective_of(stage: Stage, config: HolisticVLMConfig, learning: Sequence[str]) -> Objective:
    """The loss of a stage for a student with that config, of which `learning` learns.

    Layer losses are taken in linear layers where something learns. Raises `RecipeError` if there is
    none, or if the loss does not depend on a parameter that learns: weight decay alone would change
    that.
    """
    if stage.loss == "kl":
        return LogitsKL(stage.kl or KL(), stage.loss_scale)
    owners = {int(n.split(".")[2]) for n in learning if n.startswith("model.layers.")}
    linear = {i for i, kind in enumerate(config.layer_types) if kind == LINEAR}
    layers = tuple(sorted(owners & linear))
    if not layers:
        raise RecipeError(
            f"stages.{stage.name}.learns: no linear layer learns, and loss {stage.loss} is one of "
            "linear layers",
            "name parameters of their mixers, or take loss: kl",
        )
    objective = Layerwise(LAYER_LOSSES[stage.loss], layers, stage.inputs, stage.loss_scale)
    unreached = [name for name in learning if not objective.reaches(name)]
    if unreached:
        others = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
        raise RecipeError(
            f"stages.{stage.name}.learns: loss {stage.loss} does not depend on "
            f"{unreached[0]}{others}; weight decay alone would change them",
            _reachable(stage, objective, learning, config),
        )
    return objective


def _reachable(
    stage: Stage, objective: Layerwise, learning: Sequence[str], config: HolisticVLMConfig
) -> str:
    """The setting that lets only those learn which the loss depends on."""
    reached = [name for name in learning if objective.reaches(name)]
    # Patterns over all layers would name attention's projections as well.
    if len(objective.layers) == len(config.layer_types):
        reached = [f"*.{'.'.join(name.split('.')[3:])}" for name in reached]
    return f"--set 'stages.{stage.name}.learns=[{', '.join(sorted(set(reached)))}]'"


def wanted_stages(recipe: Recipe, text: str | None) -> tuple[str, ...] | None:
    """Stage names from `--stage`, which takes names and numbers, as "stage3" or "1,2".

    None if nothing was asked for. Raises `RunError` for a stage the recipe has not.
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


def choose_start(
    run: Run, recipe: Recipe, wanted: tuple[str, ...] | None, named: str | None
) -> Manifest:
    """The product that the first stage starts from.

    It is `named`, or the current one if the first wanted stage is its next, or else the newest
    product of which that is true. Raises `RunError` if a stage that must come before is missing.
    """
    names = [stage.name for stage in recipe.stages]
    current = run.product(named or run.record.current)
    _check_known(current, names)
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
        kin = _ancestors(run, current)
        ready = [p for p in ready if p.name in kin] or ready
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


def stages_to_run(
    recipe: Recipe, start: Manifest, wanted: tuple[str, ...] | None
) -> tuple[Stage, ...]:
    """The wanted stages, or all that `start` has not done."""
    if wanted is not None:
        return tuple(stage for stage in recipe.stages if stage.name in wanted)
    return recipe.stages[len(start.stages) :]


def stage_product(parent: Manifest, stage: Stage) -> str:
    """What a stage's product is called: `stage1`, `stage2`, `linear-stage3`, `hybrid-8-stage3`."""
    base = parent.name
    if parent.stages:
        base = base.removesuffix(f"-{parent.stages[-1]}")
    if parent.attention_layers:
        return f"{base}-{stage.name}"
    return f"linear-{stage.name}" if stage.layers == "planned" else stage.name


def is_final(stage: Stage) -> bool:
    """Whether a student is distilled end to end after `stage`."""
    return stage.inputs == "student" and stage.loss == "kl"


def _check_known(product: Manifest, names: Sequence[str]) -> None:
    done = list(product.stages)
    if done != list(names[: len(done)]):
        raise RunError(
            f"product {product.name!r} has done {', '.join(done)}, which is not how the recipe "
            f"begins: {', '.join(names)}",
            "take the recipe it was made with, or start from another product with --from",
        )


def _ancestors(run: Run, product: Manifest) -> set[str]:
    products, found = run.products(), set()
    name: str | None = product.name
    while name in products and name not in found:
        found.add(name)
        name = next((p.name for p in products[name].parents if p.role == "student"), None)
    return found
