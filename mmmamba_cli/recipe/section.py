"""Base of the sections of a recipe, types of their fields, and their validation errors."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_SEED = 2**32 - 1

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: strict types, frozen, unknown keys rejected."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


def invalid_value(sentence: str, *within: str | int) -> PydanticCustomError:
    """A validation error; `within` is the path from the validated value to the invalid one."""
    return PydanticCustomError("recipe", "{sentence}", {"sentence": sentence, "within": within})
