"""Cells of a plan (arm x seed), their recipes, and the trainings that several of them share."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from mmmamba_cli.ablation.plan import TEACHER_ARM, WORK, Arm, Plan, SuiteUse
from mmmamba_cli.ablation.run_folders import KEEP_WORDS
from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe import CALIBRATED, Recipe, load_recipe
from mmmamba_cli.recipe.problems import join_or, suggest

DIGEST_DIGITS = 12
# Fields of a recipe that change neither weights nor scores.
STAGE_FIELDS_WITHOUT_EFFECT = ("checkpointing", "evaluate_every", "save_every")
DATA_FIELDS_WITHOUT_EFFECT = ("held_out", "max_bad_share", "workers")
# Fields of the data that depend on the machine.
MACHINE_FIELDS = ("image_root", "max_bad_share", "workers")
# Fields of a recipe that the plan sets, and where.
PLAN_FIELDS = {"seed": "seeds", "teacher": "teacher"}


@dataclass(frozen=True)
class Cell:
    """One arm with one seed; the teacher's cell has no recipe.

    `stages` are the names of the stages to run. `prefixes` are digests of everything that the
    weights depend on after seeding and after each stage: cells with an equal digest have equal
    weights there. `training` is the JSON text of all settings that the evaluated weights depend on,
    without those of suites.
    """

    arm: str
    seed: int | None
    recipe: Recipe | None
    stages: tuple[str, ...]
    commands: tuple[str, ...]
    suites: tuple[SuiteUse, ...]
    prefixes: tuple[str, ...]
    training: str

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Name of the run directory; another training gets another one."""
        return f"{self.name}-{self.digest_with(())}"

    @property
    def digest(self) -> str:
        """A digest of all settings that the JSON of the cell depends on."""
        return self.digest_with(self.suites)

    def digest_with(self, suites: Sequence[SuiteUse]) -> str:
        """The digest of the cell's training and of these suites alone."""
        return _digest(*json.loads(self.training), [_suite_settings(suite) for suite in suites])


@dataclass(frozen=True)
class SharedStages:
    """Stages that several cells have in common, trained once.

    `stages` are all stages done at their end, `parent` those that they continue.
    """

    digest: str
    recipe: Recipe
    stages: tuple[str, ...]
    parent: SharedStages | None

    @property
    def name(self) -> str:
        return f"{'+'.join(self.stages)}-{self.digest}"

    @property
    def folder(self) -> str:
        return f"shared-{self.name}"


def expand(plan: Plan, sets: Sequence[str] = (), work: str = WORK) -> list[Cell]:
    """All cells of a plan: the teacher, then every arm of each seed, in the plan's order.

    `sets` change the base, as `--set` of other commands; a field that an arm sets keeps the arm's
    value. Raises `RecipeError` that names the arm and the field.
    """
    _check_sets(sets)
    teacher = _cell(plan, TEACHER_ARM, None, None, (), (), work)
    found = [teacher] if teacher.suites else []
    recipes = {arm.name: _recipe(plan, arm, sets, work) for arm in plan.arms}
    for seed in plan.seeds:
        for arm in plan.arms:
            recipe = recipes[arm.name].model_copy(update={"seed": seed})
            stages = _stages(plan, arm, recipe)
            _check_attention(plan, arm, recipe, stages)
            if stages:
                recipe = _with_stages(recipe, stages)
            commands = tuple(word for one in plan.lineage(arm) for word in one.commands)
            found.append(_cell(plan, arm.name, seed, recipe, stages, commands, work))
    return found


def check_keep(keep: Sequence[str], cells: Sequence[Cell]) -> None:
    """Raise `RecipeError` for a name in `keep` that no product of the cells can have.

    Commands of arms may name their products as they like.
    """
    if any(cell.commands for cell in cells):
        return
    stages = {
        stage.name for cell in cells if cell.recipe is not None for stage in cell.recipe.stages
    }
    for name in keep:
        made = name.removesuffix("-best")
        is_product = name == "seed" or name.startswith("hybrid-") or made in stages
        if not (
            name in KEEP_WORDS or is_product or any(made.endswith(f"-{one}") for one in stages)
        ):
            raise RecipeError(
                f"keep: no product is called {name}{suggest(name, [*KEEP_WORDS, 'seed', *stages])}",
                f"name products, as seed or linear-stage3, or give {join_or(KEEP_WORDS)}",
            )


def _check_sets(sets: Sequence[str]) -> None:
    """Raise `RecipeError` for a field that a plan sets itself."""
    for text in sets:
        field = text.partition("=")[0].strip()
        if field in PLAN_FIELDS:
            raise RecipeError(
                f"--set {text}: {field} is the plan's and not the recipe's",
                f"change {PLAN_FIELDS[field]} in the plan",
            )


def select(cells: Sequence[Cell], only: str | None) -> list[Cell]:
    """The cells whose name or arm matches one of the patterns in `only`, with commas.

    Raises `RecipeError` for a pattern that no cell matches.
    """
    if only is None:
        return list(cells)
    patterns = [part.strip() for part in only.split(",") if part.strip()]
    for pattern in patterns or [only]:
        if not any(_matches(cell, pattern) for cell in cells):
            names = list(dict.fromkeys(cell.arm for cell in cells))
            raise RecipeError(
                f"--only {pattern!r} matches no cell{suggest(pattern, names)}",
                f"arms are {join_or(names)}; a cell is called ARM-seedN",
            )
    return [cell for cell in cells if any(_matches(cell, pattern) for pattern in patterns)]


def _matches(cell: Cell, pattern: str) -> bool:
    return fnmatchcase(cell.name, pattern) or fnmatchcase(cell.arm, pattern)


def _recipe(plan: Plan, arm: Arm, sets: Sequence[str], work: str) -> Recipe:
    """The recipe of an arm with all stages."""
    given = {"train": plan.data, "held_out": plan.held_out, "image_root": plan.image_root}
    overrides: dict[str, Any] = {"teacher": plan.teacher}
    base = [*_assignments(plan.set), *(f"data.{k}={json.dumps(v)}" for k, v in given.items() if v)]
    own = [text for one in plan.lineage(arm) for text in _assignments(one.set)]
    try:
        recipe = load_recipe(plan.recipe, [*base, *sets, *own], overrides)
    except RecipeError as error:
        raise RecipeError(f"arm {arm.name}: {error.message}", error.hint) from None
    paths = recipe.data.model_dump(include=set(given), exclude_none=True)
    filled = {field: path.replace(WORK, work) for field, path in paths.items()}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=filled)})


def _assignments(changes: Mapping[str, Any]) -> Iterator[str]:
    # JSON is YAML in one line.
    return (f"{field}={json.dumps(value)}" for field, value in changes.items())


def _stages(plan: Plan, arm: Arm, recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages to run. Raises `RecipeError` for one that the recipe lacks."""
    names = [stage.name for stage in recipe.stages]
    given = [one.stages for one in plan.lineage(arm) if one.stages is not None]
    if not given:
        return tuple(names)
    for stage in given[-1]:
        if stage not in names:
            raise RecipeError(
                f"arm {arm.name}: stages: is {stage}, the recipe {plan.recipe} has "
                f"{join_or(names)}{suggest(stage, names)}"
            )
    ordered = tuple(name for name in names if name in given[-1])
    if ordered != given[-1]:
        raise RecipeError(
            f"arm {arm.name}: stages: are {', '.join(given[-1])}, must be in the recipe's order, "
            f"each once: {', '.join(names)}"
        )
    return ordered


def _check_attention(plan: Plan, arm: Arm, recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise `RecipeError` if an arm sets attention layers that none of its stages has."""
    lineage = plan.lineage(arm)
    fields = {"layers", "layers.attention", "layers.select"}
    is_set = any(not fields.isdisjoint(one.set) for one in lineage)
    has_layers = recipe.layers.attention not in (0, ()) or recipe.layers.select is not None
    planned = [stage.name for stage in recipe.stages if stage.layers == "planned"]
    if (
        is_set
        and has_layers
        and not any(one.commands for one in lineage)
        and not set(planned) & set(stages)
    ):
        raise RecipeError(
            f"arm {arm.name}: layers.attention is set, and none of its stages has layers: planned, "
            "so that every layer would be linear",
            f"add {join_or(planned)} to its stages, or a command hybridize"
            if planned
            else "add a command hybridize",
        )


def _with_stages(recipe: Recipe, names: Sequence[str]) -> Recipe:
    stages = tuple(stage for stage in recipe.stages if stage.name in names)
    return recipe.model_copy(update={"stages": stages})


def _cell(
    plan: Plan,
    arm: str,
    seed: int | None,
    recipe: Recipe | None,
    stages: tuple[str, ...],
    commands: tuple[str, ...],
    work: str,
) -> Cell:
    suites = tuple(
        suite
        if suite.data is None
        else suite.model_copy(update={"data": suite.data.replace(WORK, work)})
        for suite in plan.suites
        if recipe is None or not suite.arms or any(fnmatchcase(arm, p) for p in suite.arms)
    )
    prefixes = () if recipe is None else tuple(_prefixes(plan, recipe, stages))
    return Cell(
        arm=arm,
        seed=seed,
        recipe=recipe,
        stages=stages,
        commands=commands,
        suites=suites,
        prefixes=prefixes,
        training=json.dumps(
            [
                PurePath(plan.teacher).name,
                [] if recipe is None else [plan.dtype, *_portable(recipe), stages, commands],
            ],
            sort_keys=True,
        ),
    )


def _prefixes(plan: Plan, recipe: Recipe, stages: Sequence[str]) -> Iterator[str]:
    """The digests of `Cell.prefixes`."""
    tree = _changed_fields(recipe)
    layers, data = tree.get("layers", {}), tree.get("data", {})
    kept = {k: v for k, v in data.items() if k not in DATA_FIELDS_WITHOUT_EFFECT}
    mixers = tree.get("mixer"), layers.get("mixers")
    calibration = [kept] if recipe.mixer.init == CALIBRATED else []
    done = _digest(plan.teacher, plan.dtype, recipe.seed, *mixers, *calibration)
    yield done
    for stage in tree["stages"]:
        if stage["name"] not in stages:
            continue
        own = {k: v for k, v in stage.items() if k not in STAGE_FIELDS_WITHOUT_EFFECT}
        done = _digest(done, own, kept, layers if stage.get("layers") == "planned" else None)
        yield done


def _changed_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that differ from their defaults: digests stay when recipes get new fields."""
    return recipe.model_dump(mode="json", exclude_defaults=True)


def _portable(recipe: Recipe) -> list[Any]:
    """A recipe without the folders of its files, which differ between machines."""
    tree = _changed_fields(recipe)
    data = {k: v for k, v in tree.get("data", {}).items() if k not in MACHINE_FIELDS}
    for field in ("train", "held_out"):
        if field in data and not is_corpus_spec(data[field]):
            data[field] = PurePath(data[field]).name
    left_out = {"description", "teacher", "data"}
    return [{k: v for k, v in tree.items() if k not in left_out}, data]


def is_corpus_spec(source: str) -> bool:
    """Whether a data source names a corpus, as `scenes:lessons`, and not a file."""
    return re.match(r"[a-z][a-z0-9_-]+:", source) is not None


def _suite_settings(suite: SuiteUse) -> dict[str, Any]:
    """The options of a suite that change its answers."""
    left_out = {"arms", "batch", "chance", "rule"}
    settings = suite.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
    if suite.data is not None:
        settings["data"] = PurePath(suite.data).name
    return settings


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]


def find_shared_stages(cells: Iterable[Cell]) -> dict[str, list[SharedStages]]:
    """The shared stages of each cell by its name, the first stages first.

    They end where the cells that share them go on differently, or where one of the cells ends.
    """
    listed = [cell for cell in cells if cell.recipe is not None]
    users = Counter(prefix for cell in listed for prefix in cell.prefixes[1:])
    followers: dict[str, set[str | None]] = defaultdict(set)
    for cell in listed:
        for prefix, after in zip(cell.prefixes[1:], [*cell.prefixes[2:], None], strict=False):
            followers[prefix].add(after)
    made: dict[str, SharedStages] = {}
    found: dict[str, list[SharedStages]] = {}
    for cell in listed:
        path: list[SharedStages] = []
        for depth, prefix in enumerate(cell.prefixes[1:], start=1):
            if users[prefix] < 2 or (len(followers[prefix]) < 2 and followers[prefix] != {None}):
                continue
            if prefix not in made:
                assert cell.recipe is not None
                recipe = _with_stages(cell.recipe, cell.stages[:depth])
                parent = path[-1] if path else None
                made[prefix] = SharedStages(prefix, recipe, cell.stages[:depth], parent)
            path.append(made[prefix])
        found[cell.name] = path
    return found
