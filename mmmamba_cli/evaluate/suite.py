"""Suites: table, prompt style and scoring rules, one YAML file each."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmmamba_cli.errors import DataError
from mmmamba_cli.recipe.problems import validation_problems

# The suffix of a rule's name: the month since which its version applies.
DATE = re.compile(r"-\d{4}-\d{2}$")

Text = Annotated[str, Field(min_length=1)]


class PromptStyle(BaseModel):
    """The format of a question.

    The style `choices` puts the hint before the question and the options after it. The suffix
    `remove` is removed from the question, then `append` is appended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: Literal["question", "choices"] = "question"
    remove: str = ""
    append: str = ""


class Published(BaseModel):
    """The rule and metric to compare with a column of the published table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: Text
    rule: Text
    metric: Text


class Suite(BaseModel):
    """The contents of a suite's YAML file.

    `dataset` is the name of the TSV. `rules` maps displayed names to scoring functions; the first
    rule is the default for retention, and without rules answers are only written. A rule that a kit
    changed has one entry per version, `<kit>-<year>-<month>` with the month since which it applies.
    `earlier` rules are used only by name (--rule). `unit` is the resampling unit of the confidence
    intervals: each row, all rows of a picture, the pair of questions about a picture in a category,
    or the turns of a circular question. `only` filters rows by column values; missing columns pass.
    `enlarge` scales up the first picture before tiling. `choices` are the options of rows without
    their own. `build`, as `package.module:function`, writes the table into a given folder, so that
    the suite needs no --data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    title: Text
    version: Annotated[int, Field(ge=1)]
    dataset: Text
    columns: tuple[Text, ...]
    prompt: PromptStyle = PromptStyle()
    max_tiles: Annotated[int, Field(ge=1)] = 6
    enlarge: Annotated[int, Field(ge=1)] = 1
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    unit: Literal["row", "picture", "pair", "turns"] = "row"
    choices: tuple[Text, ...] = ()
    only: dict[str, str] = {}
    rules: dict[str, Text] = {}
    earlier: dict[str, Text] = {}
    build: str = ""
    published: Published | None = None
    note: str = ""

    @property
    def digest(self) -> str:
        """A digest of all fields that can change an answer or a score."""
        return self._digest("title", "note", "published", "earlier")

    @property
    def questions_digest(self) -> str:
        """A digest of all fields that can change an answer, without the scoring rules."""
        return self._digest("title", "note", "published", "earlier", "rules")

    def _digest(self, *left_out: str) -> str:
        kept = self.model_dump(mode="json", exclude=set(left_out))
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def scoring(self, only: str | None = None) -> dict[str, str]:
        """Scoring functions by rule: all of `rules`, or the one named by `only`.

        A kit's name without a date selects the newest version. Raises `DataError` if the suite does
        not have the rule.
        """
        if only is None:
            return self.rules
        known = {**self.rules, **self.earlier}
        if only in known:
            return {only: known[only]}
        dated = [name for name in known if undated(name) == only]
        if not dated:
            listed = ", ".join(known) or "none: its answers need a judge"
            raise DataError(f"suite {self.name} has no rule {only}, it has: {listed}")
        newest = max(dated)
        return {newest: known[newest]}


def undated(rule: str) -> str:
    """The name of a rule without its date: `vlmevalkit` for `vlmevalkit-2026-06`."""
    return DATE.sub("", rule)


def parse_suite(text: str, where: str) -> Suite:
    """Parse a suite from YAML. Raises `DataError` that names the file and every wrong field."""
    try:
        raw: Any = yaml.safe_load(text)
        return Suite.model_validate(raw)
    except yaml.YAMLError as error:
        raise DataError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = validation_problems(error, Suite)
        wrong = "; ".join(problem.line("") for problem in problems)
        raise DataError(f"{where} is no suite: {wrong}") from error
