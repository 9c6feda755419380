"""The plan of an ablation: typed, frozen, unknown keys rejected, as recipes are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from mmmamba_cli.errors import RecipeError
from mmmamba_cli.recipe.problems import (
    Allowed,
    format_value,
    join_or,
    suggest,
    validation_problems,
)
from mmmamba_cli.recipe.section import MAX_SEED, Section, Text, invalid_value
from mmmamba_cli.recipe.yaml_text import read_yaml

# The cell of the teacher, which every plan has.
TEACHER_ARM = "teacher"
# Replaced by the work folder in `data`, `prepare`, `commands` and the suites' `data`.
WORK = "{work}"

NAME_ALLOWED = Allowed(
    "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit"
)
SET_ALLOWED = Allowed("a section of recipe fields and their values, as stages.stage3.steps: 600")
SECONDS_ALLOWED = Allowed("a section of names and seconds above 0")
# The category of a mark that is the suite's lowest.
WORST = "worst"
GENERATED, LIKELIHOOD = "generated", "likelihood"
ANSWERS_ALLOWED = Allowed(f"{GENERATED}, {LIKELIHOOD}, or a list of both")


def _check_name(value: Any) -> str:
    # The name becomes part of a file's name.
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        return value
    raise invalid_value(f"is {format_value(value)}, must be {NAME_ALLOWED.words}")


def _check_set(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise invalid_value(f"is {format_value(value)}, must be {SET_ALLOWED.words}")


def _check_seconds(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise invalid_value(f"is {format_value(value)}, must be {SECONDS_ALLOWED.words}")
    for name, seconds in value.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds <= 0:
            raise invalid_value(f"is {format_value(seconds)}, must be a number above 0", name)
    return {name: float(seconds) for name, seconds in value.items()}


def _check_answers(value: Any) -> Any:
    given = [value] if isinstance(value, str) else value
    if (
        isinstance(given, list | tuple)
        and given
        and all(one in (GENERATED, LIKELIHOOD) for one in given)
        and len(set(given)) == len(given)
    ):
        return given[0] if len(given) == 1 else tuple(given)
    raise invalid_value(f"is {format_value(value)}, must be {ANSWERS_ALLOWED.words}")


Way = Literal["generated", "likelihood"]
Answers = Annotated[Way | tuple[Way, ...], BeforeValidator(_check_answers), ANSWERS_ALLOWED]
Name = Annotated[str, BeforeValidator(_check_name), NAME_ALLOWED]
Changes = Annotated[dict[str, Any], BeforeValidator(_check_set), SET_ALLOWED]
Seconds = Annotated[dict[str, Any], BeforeValidator(_check_seconds), SECONDS_ALLOWED]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


class SuiteUse(Section):
    """A suite that finished cells are evaluated on, and its options."""

    name: Text = Field(description="Name of an installed suite.")
    label: Name | None = Field(
        default=None, description="Name in tables; null takes the suite's. Unique in the plan."
    )
    data: Text | None = Field(
        default=None,
        description="Folder of its table, for pictures or a version of one's own; null takes the "
        "suite's own table.",
    )
    limit: int | None = Field(default=None, ge=1, description="Questions; null asks all.")
    max_tiles: int | None = Field(default=None, ge=1, description="Tiles per picture.")
    max_new_tokens: int | None = Field(default=None, ge=1, description="Tokens of an answer.")
    batch: int | None = Field(default=None, ge=1, description="Prompts per batch; null: auto.")
    answers: Answers = Field(
        default="generated",
        description="generated, or likelihood: the likeliest option, where a row has options. A "
        "list of both is two suites; that of likelihood is called LABEL-likelihood.",
    )
    rule: Text | None = Field(default=None, description="Rule of tables; null takes the first.")
    chance: float | None = Field(
        default=None,
        description="Score of a blind guess, for retention above chance; null takes the rule's.",
    )
    arms: Texts = Field(
        default=(), description="Patterns of the arms that are evaluated on it; empty: all."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def is_by_likelihood(self) -> bool:
        return self.answers == LIKELIHOOD


def _one_way_each(suites: tuple[SuiteUse, ...]) -> tuple[SuiteUse, ...]:
    """Suites with one way to answer each: an entry with several becomes several."""
    found: list[SuiteUse] = []
    for use in suites:
        if isinstance(use.answers, str):
            found.append(use)
            continue
        for way in use.answers:
            changes: dict[str, Any] = {"answers": way}
            if way == LIKELIHOOD:
                changes["label"] = f"{use.title}-{LIKELIHOOD}"
            found.append(use.model_copy(update=changes))
    return tuple(found)


class Preparation(Section):
    """Data that a command of mmmamba makes if they do not exist."""

    path: Text = Field(description="File or folder that the command makes.")
    command: Text = Field(description="Words behind `mmmamba`; {path} and {work} are replaced.")


class Arm(Section):
    """One condition: changes of the base, stages, and own commands."""

    name: Name = Field(description="Names cells and rows of tables. Unique in the plan.")
    title: str = Field(default="", description="Row in tables; empty takes the name.")
    parent: Text | None = Field(
        default=None,
        description="Arm whose changes, stages and commands this one begins with.",
    )
    set: Changes = Field(default={}, description="Recipe fields that differ from the base.")
    stages: Annotated[tuple[Text, ...] | None, Field(strict=False)] = Field(
        default=None,
        description="Stages of the recipe to run, in its order; null takes the parent's, or all.",
    )
    commands: Texts = Field(
        default=(),
        description="Words behind `mmmamba`, run after the stages; {run}, {recipe}, {seed} and "
        "{work} are replaced. The product that is current then is evaluated.",
    )


class Hints(Section):
    """Estimates of seconds, used until cells have been measured."""

    step: Seconds = Field(default={}, description="Seconds of a step, by stage.")
    suite: Seconds = Field(default={}, description="Seconds of a suite, by its label.")
    cell: float = Field(
        default=0.0, ge=0, description="Seconds of everything else in a cell: loading, writing."
    )


class Table(Section):
    """A table of the results page."""

    name: Name = Field(description="Identifies the table. Unique in the plan.")
    title: str = Field(default="", description="Heading of the table; empty takes the name.")
    arms: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = Field(
        description="Rows, in order."
    )
    base: Text | None = Field(
        default=None, description="Arm that the others are compared with; null takes the plan's."
    )
    suites: Texts = Field(default=(), description="Labels of its suites; empty: all.")
    note: str = Field(default="", description="A sentence below the table.")
    categories: bool = Field(
        default=False, description="Whether to show the scores of each suite's categories."
    )
    deviations: bool = Field(
        default=False,
        description="Whether to count deviations from the base beyond the spread of its seeds.",
    )


class Mark(Section):
    """A score that an arm is to reach."""

    arm: Text = Field(description="Arm whose mean over seeds counts.")
    suite: Text = Field(description="Label of the suite.")
    category: Text | None = Field(
        default=None,
        description=f"Category of the suite, or {WORST}: the lowest; null takes the suite's score.",
    )
    share: Literal["teacher", "above-chance", "score"] = Field(
        default="teacher",
        description="What is compared: percent of the teacher's score, the same above chance, or "
        "the score itself.",
    )
    at_least: float = Field(description="Lowest value that reaches the mark.")


class Plan(Section):
    """An ablation: what all cells share, and the arms and seeds they differ in."""

    name: Name = Field(description="Names the folders of results and work.")
    description: str = Field(default="", description="What is asked, in a sentence or two.")
    out: Text | None = Field(
        default=None, description="Folder of results; null: benchmarks/results/evidence/NAME."
    )
    teacher: Text = Field(description="Path, shipped name or hub id of the teacher.")
    allow_bidirectional: bool = Field(
        default=False,
        description="Whether to convert a teacher whose image tokens attend in both directions.",
    )
    recipe: Text = Field(description="Name or file of the recipe of all arms.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="Dtype of the students' weights on disk."
    )
    set: Changes = Field(default={}, description="Recipe fields that differ in all arms.")
    data: Text | None = Field(default=None, description="Training data, as data.train.")
    held_out: Text | None = Field(default=None, description="Held-out data, as data.held_out.")
    image_root: Text | None = Field(default=None, description="As data.image_root.")
    prepare: Annotated[tuple[Preparation, ...], Field(strict=False)] = Field(
        default=(), description="Data that commands make before the first cell."
    )
    suites: Annotated[tuple[SuiteUse, ...], Field(strict=False), AfterValidator(_one_way_each)] = (
        Field(default=(), description="Suites of every finished cell.")
    )
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = Field(
        default=(0,), description="Seeds of each arm."
    )
    keep: Texts = Field(
        default=("evaluated",),
        description="Products that stay in the run folder of a finished cell: names, `evaluated`, "
        "`all` or `none`.",
    )
    estimates: Hints = Field(default=Hints(), description="Seconds, until they are measured.")
    base: Text = Field(description="Arm that the others are compared with.")
    arms: Annotated[tuple[Arm, ...], Field(strict=False, min_length=1)] = Field(
        description="The conditions."
    )
    tables: Annotated[tuple[Table, ...], Field(strict=False)] = Field(
        default=(), description="Tables of the results; empty: one table of all arms."
    )
    marks: Annotated[tuple[Mark, ...], Field(strict=False)] = Field(
        default=(), description="Scores that arms are to reach; the results say which do."
    )

    def arm(self, name: str) -> Arm:
        """The arm of that name, which must exist."""
        return next(arm for arm in self.arms if arm.name == name)

    def lineage(self, arm: Arm) -> list[Arm]:
        """The arm and its parents, the first parent first."""
        found = [arm]
        while found[0].parent is not None:
            found.insert(0, self.arm(found[0].parent))
        return found

    @property
    def all_tables(self) -> tuple[Table, ...]:
        """The plan's tables, or one of all arms."""
        if self.tables:
            return self.tables
        return (Table(name=self.name, arms=tuple(arm.name for arm in self.arms)),)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _check_unique([arm.name for arm in self.arms], "arms", "name")
        _check_unique([suite.title for suite in self.suites], "suites", "label")
        _check_unique([table.name for table in self.tables], "tables", "name")
        for position, seed in enumerate(self.seeds):
            if not 0 <= seed <= MAX_SEED or seed in self.seeds[:position]:
                sentence = f"is {seed}, must be a number from 0 to {MAX_SEED}, given once"
                raise invalid_value(sentence, "seeds", position)
        for position, arm in enumerate(self.arms):
            if arm.name == TEACHER_ARM:
                raise invalid_value(
                    "is teacher, which is the cell of the teacher: rename the arm",
                    "arms",
                    position,
                    "name",
                )
        return self

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        names = [arm.name for arm in self.arms]
        _check_known(self.base, names, "arm", "base")
        for position, arm in enumerate(self.arms):
            if arm.parent is not None:
                # A parent stands before its children, so that there are no cycles.
                before = names[:position]
                _check_known(arm.parent, before, "arm above it", "arms", position, "parent")
        labels = [suite.title for suite in self.suites]
        for position, table in enumerate(self.tables):
            place = ("tables", position)
            for row, name in enumerate(table.arms):
                _check_known(name, [*names, TEACHER_ARM], "arm", *place, "arms", row)
            for column, label in enumerate(table.suites):
                _check_known(label, labels, "suite", *place, "suites", column)
            if table.base is not None:
                _check_known(table.base, names, "arm", *place, "base")
        for position, mark in enumerate(self.marks):
            _check_known(mark.arm, names, "arm", "marks", position, "arm")
            _check_known(mark.suite, labels, "suite", "marks", position, "suite")
        return self


def _check_unique(names: list[str], section: str, field: str) -> None:
    for position, name in enumerate(names):
        if name in names[:position]:
            first = names.index(name)
            sentence = f"is {name}, which is the name of {section}[{first}] already"
            raise invalid_value(sentence, section, position, field)


def _check_known(name: str, known: list[str], what: str, *place: str | int) -> None:
    if name not in known:
        advice = (
            f"give {join_or(known)}{suggest(name, known)}"
            if known
            else "leave it out, there is none"
        )
        sentence = f"is {name}, which is no {what}: {advice}"
        raise invalid_value(sentence, *place)


def parse_plan(text: str, source: str) -> Plan:
    """Parse YAML text as `load_plan` does; `source` names the text in errors."""
    tree = read_yaml(text, source)
    if not isinstance(tree, dict):
        keys = ", ".join(Plan.model_fields)
        raise RecipeError(f"{source}: must be a section with the keys {keys}")
    try:
        return Plan.model_validate({"name": Path(source).stem, **tree})
    except ValidationError as error:
        lines = [problem.line(source) for problem in validation_problems(error, Plan)]
        raise RecipeError("\n".join(lines)) from None


def load_plan(file: Path) -> Plan:
    """Load a plan from a YAML file; its name is that of the file unless it has one.

    Raises:
        RecipeError: one line per problem, `file: section.field: problem, allowed values`.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(f"{file}: no such file", "give the YAML file of a plan") from None
    except IsADirectoryError:
        raise RecipeError(f"{file}: is a folder, must be a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not text in UTF-8 (byte {error.start})") from None
    return parse_plan(text, str(file))
