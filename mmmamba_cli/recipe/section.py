"""Base of the sections of a recipe, and its validation errors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of all sections: strict types, frozen, unknown keys rejected."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


def invalid_value(sentence: str, *within: str | int) -> PydanticCustomError:
    """A validation error; `within` is the path from the validated value to the invalid one."""
    return PydanticCustomError("recipe", "{sentence}", {"sentence": sentence, "within": within})
