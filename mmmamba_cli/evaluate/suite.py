"""A suite: which table, how it is asked, how it is scored. One YAML file each."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmmamba_cli.errors import DataError

# The end of a rule's name that says since which month its version holds.
DATE = re.compile(r"-\d{4}-\d{2}$")

Text = Annotated[str, Field(min_length=1)]


class PromptStyle(BaseModel):
    """How a row becomes a question.

    `choices` puts the hint before it and lists the options behind it. `remove` is taken off its
    end, then `append` is put there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    style: Literal["question", "choices"] = "question"
    remove: str = ""
    append: str = ""


class Published(BaseModel):
    """Which of our numbers a column of the published table is to be held against."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: Text
    rule: Text
    metric: Text


class Suite(BaseModel):
    """The contents of a suite's YAML file.

    `dataset` is the name of its TSV. `rules` are scoring functions by the name they are shown
    under, the first one is what retention is told by; without any, answers are only written down.
    A kit's rule that has changed is one rule for each version, `<kit>-<year>-<month>` by the month
    since which it holds. `earlier` are rules that score only where they are asked for by name.
    `unit` says what is drawn again when errors are estimated: each row, all rows of a picture, the
    pair of questions about a picture in a category, or the turns of a circular question. `only`
    keeps rows that have these values, where there is such a column. `enlarge` scales the first
    picture up before it is cut. `choices` are the answers to choose from where a row has none.
    `build`, as `package.module:function`, writes the table into a folder it is given, so that the
    suite can do without --data.
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
        """Changes with anything in the file that can change an answer or a score."""
        return self._digest("title", "note", "published", "earlier")

    @property
    def questions_digest(self) -> str:
        """Changes with anything in the file that can change an answer; scoring rules cannot."""
        return self._digest("title", "note", "published", "earlier", "rules")

    def _digest(self, *left_out: str) -> str:
        kept = self.model_dump(mode="json", exclude=set(left_out))
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def scoring(self, only: str | None = None) -> dict[str, str]:
        """Scoring functions by rule: `rules`, or only the one named.

        A kit's name without a date means the newest version of its rule. Raises `DataError` if the
        suite has no such rule.
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
    """A rule's name without the date of its version: `vlmevalkit-2026-06` is `vlmevalkit`."""
    return DATE.sub("", rule)


def parse_suite(text: str, where: str) -> Suite:
    """A suite from YAML. Raises `DataError` that names the file and every field that is wrong."""
    try:
        raw: Any = yaml.safe_load(text)
        return Suite.model_validate(raw)
    except yaml.YAMLError as error:
        raise DataError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, found['loc'])) or 'the file'}: {found['msg'].lower()}"
            for found in error.errors(include_url=False)
        )
        raise DataError(f"{where} is no suite: {wrong}") from error
