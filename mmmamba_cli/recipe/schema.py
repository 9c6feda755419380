"""Recipe schema: typed, frozen pydantic models that reject unknown keys; see `stage_schema` too.

Defaults are the paper's (mmMamba, arXiv 2502.13145) where it gives a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mmmamba_cli.recipe.layers import is_selection, layer_list_problem
from mmmamba_cli.recipe.mixers import LayerMixers, Mixer, mixer_problem
from mmmamba_cli.recipe.problems import Allowed, format_value
from mmmamba_cli.recipe.section import MAX_SEED, Section, Share, Text, invalid_value
from mmmamba_cli.recipe.stage_schema import Stage

ATTENTION_ALLOWED = Allowed("a whole number of layers, at least 0, or a list of layer indices")
SELECT_ALLOWED = Allowed("kl-zero, kl, recall, mse, file:SCORES.json, or null")


def _check_attention(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        raise invalid_value(f"is {format_value(value)}, must be {ATTENTION_ALLOWED.words}")
    if isinstance(value, int):
        if value < 0:
            raise invalid_value(f"is {value}, must be {ATTENTION_ALLOWED.words}")
        return value
    for position, layer in enumerate(value):
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise invalid_value(
                f"is {format_value(layer)}, must be a layer index, at least 0", position
            )
    problem = layer_list_problem(value)
    if problem is not None:
        position, sentence = problem
        raise invalid_value(sentence, position)
    return tuple(sorted(value))


def _check_select(value: Any) -> str | None:
    if value is None or is_selection(value):
        return value
    raise invalid_value(f"is {format_value(value)}, must be {SELECT_ALLOWED.words}")


AttentionLayers = Annotated[
    int | tuple[int, ...], BeforeValidator(_check_attention), ATTENTION_ALLOWED
]
Select = Annotated[str | None, BeforeValidator(_check_select), SELECT_ALLOWED]
Placement = Literal["head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked"]


class Layers(Section):
    """Which layers are the teacher's attention, from the first stage with `layers: planned` on."""

    attention: AttentionLayers = Field(
        default=0,
        description="How many layers stay attention, or their indices, counted from 0 through both "
        "stacks. 0 is the linear student.",
    )
    placement: Placement = Field(
        default="head-interleaved",
        description="Where a number of attention layers goes: first or last layer of each block of "
        "L/n, or the first or last n layers. Not used when indices are given.",
    )
    select: Select = Field(
        default=None,
        description="Measurement that ranks the layers, of which the best get the attention, in "
        "the place of a placement; null uses the placement.",
    )
    mixers: LayerMixers = Field(
        default={},
        description="Layers with another mixer than mixer.kind, as a list of indices for each "
        "mixer; a layer that is attention is attention all the same.",
    )

    @model_validator(mode="after")
    def _check_select_has_number(self) -> Self:
        if self.select is not None and not isinstance(self.attention, int):
            raise invalid_value(
                "is given, must be null where layers.attention lists the layers", "select"
            )
        return self


class Data(Section):
    """Material for the stages. Paths count from the working directory."""

    train: Text | None = Field(
        default=None,
        description="Conversations: a .jsonl file, an InternVL meta .json that names several, or "
        "webdataset shards (.tar, with {000..099} for a range), Parquet files (or a folder that "
        "datasets saved), or a generated corpus such as scenes:lessons?long=0.33.",
    )
    held_out: Text | None = Field(
        default=None,
        description="Held-out conversations in the same formats; null leaves them out.",
    )
    image_root: Text | None = Field(
        default=None,
        description="Folder that image paths in the data count from, held-out data too; none may "
        "leave it. The folder of each data file if null.",
    )
    max_length: int = Field(
        default=8192,
        ge=2,
        le=2**20,
        description="Longest sequence in tokens, image tokens included.",
    )
    max_tiles: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Most tiles per image; null takes the teacher's setting.",
    )
    batching: Literal["packed", "bucketed", "padded"] = Field(
        default="bucketed",
        description="packed: several samples per row, state and attention reset at boundaries; "
        "bucketed: samples of similar length together; padded: in shuffled order.",
    )
    max_bad_share: Share = Field(
        default=0.01, description="Share of samples that may be unreadable before the run stops."
    )
    shuffle: bool = Field(default=True, description="Shuffle each pass over the data.")
    shuffle_seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the order; null takes the recipe's seed.",
    )
    workers: int = Field(default=2, ge=0, le=256, description="Loader processes of each rank.")


def stage_data(data: Data, stage: Stage) -> Data:
    """The data of a stage: `data`, with the stage's own training set if it names one."""
    return data if stage.train is None else data.model_copy(update={"train": stage.train})


class Recipe(Section):
    """How a teacher becomes a student."""

    description: str = Field(default="", description="One line for `mmmamba recipe list`.")
    teacher: Text | None = Field(
        default=None,
        description="Path or hub id of the teacher; null where the command line names it.",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="Of every random number of the run."
    )
    layers: Layers = Field(default=Layers(), description="Which layers stay attention.")
    mixer: Mixer = Field(default=Mixer(), description="The mixer of linear layers.")
    data: Data = Field(default=Data(), description="What is learned from.")
    stages: tuple[Stage, ...] = Field(
        strict=False, min_length=1, description="The stages of distillation, in order."
    )

    @model_validator(mode="after")
    def _check_mixers(self) -> Self:
        problem = mixer_problem(self.mixer, self.layers.mixers)
        if problem is not None:
            raise invalid_value(problem[1], "mixer", problem[0])
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        first_seen: dict[str, int] = {}
        planned = False
        for position, stage in enumerate(self.stages):
            if stage.name in first_seen:
                raise invalid_value(
                    f"is {stage.name}, which names stages[{first_seen[stage.name]}] already",
                    "stages",
                    position,
                    "name",
                )
            if planned and stage.layers == "all":
                raise invalid_value(
                    "is all, must be planned: an earlier stage restored attention",
                    "stages",
                    position,
                    "layers",
                )
            first_seen[stage.name] = position
            planned = stage.layers == "planned"
        return self
