"""A suite: which table, how it is asked, how it is scored. One YAML file each."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmmamba_cli.errors import DataError

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
    build: str = ""
    published: Published | None = None
    note: str = ""

    @property
    def digest(self) -> str:
        """Changes with anything in the file that can change an answer or a score."""
        kept = self.model_dump(mode="json", exclude={"title", "note", "published"})
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


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
