"""Recipe schema: typed, frozen pydantic models that reject unknown keys.

Defaults are the paper's (mmMamba, arXiv 2502.13145) where it gives a number. Fields without a
default must be set for each stage: parameters, loss, steps, batch size, learning rate.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mmmamba_cli.recipe.layers import is_selection, layer_list_problem
from mmmamba_cli.recipe.mixers import LayerMixers, Mixer, mixer_problem
from mmmamba_cli.recipe.problems import Allowed, format_value
from mmmamba_cli.recipe.section import Section, invalid_value

MAX_SEED = 2**32 - 1

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

ATTENTION_ALLOWED = Allowed("a whole number of layers, at least 0, or a list of layer indices")
LEARNS_ALLOWED = Allowed(
    "new, new+qkv, or a list of patterns of parameter names, as ['*.mixer.A_log']"
)
SELECT_ALLOWED = Allowed("kl-zero, kl, recall, mse, file:SCORES.json, or null")
CHECKPOINTING_ALLOWED = Allowed("true, false or auto")
STAGE_NAME_ALLOWED = Allowed(
    "a name of lower-case letters, digits, '-' and '_' that begins with a letter"
)


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


def _check_learns(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list | tuple):
        for position, pattern in enumerate(value):
            if not isinstance(pattern, str) or not pattern:
                raise invalid_value(f"is {format_value(pattern)}, must be a pattern", position)
        if value:
            return tuple(value)
    elif value in ("new", "new+qkv"):
        return str(value)
    raise invalid_value(f"is {format_value(value)}, must be {LEARNS_ALLOWED.words}")


def _check_select(value: Any) -> str | None:
    if value is None or is_selection(value):
        return value
    raise invalid_value(f"is {format_value(value)}, must be {SELECT_ALLOWED.words}")


def _check_checkpointing(value: Any) -> bool | str:
    if isinstance(value, bool) or value == "auto":
        return value
    raise invalid_value(f"is {format_value(value)}, must be {CHECKPOINTING_ALLOWED.words}")


def _check_stage_name(value: Any) -> str:
    # Lower-case ASCII, since stage names become names of products and folders.
    if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", value):
        return value
    raise invalid_value(f"is {format_value(value)}, must be {STAGE_NAME_ALLOWED.words}")


AttentionLayers = Annotated[
    int | tuple[int, ...], BeforeValidator(_check_attention), ATTENTION_ALLOWED
]
Select = Annotated[str | None, BeforeValidator(_check_select), SELECT_ALLOWED]
Checkpointing = Annotated[
    bool | Literal["auto"], BeforeValidator(_check_checkpointing), CHECKPOINTING_ALLOWED
]
Placement = Literal["head-interleaved", "tail-interleaved", "head-stacked", "tail-stacked"]
StageName = Annotated[str, BeforeValidator(_check_stage_name), STAGE_NAME_ALLOWED]
Learns = Annotated[
    Literal["new", "new+qkv"] | tuple[str, ...], BeforeValidator(_check_learns), LEARNS_ALLOWED
]


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


class Schedule(Section):
    """Learning rate over the steps of a stage; it begins at 0 and peaks at the stage's lr."""

    kind: Literal["wsd", "cosine", "constant"] = Field(
        default="wsd",
        description="After the warm-up: wsd: stable, then a linear decay; cosine: decay all the "
        "way; constant: no decay.",
    )
    warmup: Share = Field(default=0.1, description="Share of the steps that warm up.")
    decay: Share = Field(default=0.1, description="Share of the steps that decay (wsd only).")
    final: Share = Field(
        default=0.0, description="Last learning rate, as a share of the stage's lr."
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise invalid_value(
                f"is {self.decay}, must be at most 1 - warmup = {1 - self.warmup:g}", "decay"
            )
        return self


class Optimiser(Section):
    """AdamW; biases, norms, A_log and dt_bias are never decayed."""

    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), strict=False, description="Decay of the first and the second moment."
    )
    eps: float = Field(
        default=1e-8, gt=0, le=1e-2, description="Added to the root of the second moment."
    )
    weight_decay: float = Field(default=0.05, ge=0, lt=1, description="Decoupled weight decay.")
    clip: float | None = Field(
        default=5.0, gt=0, description="Norm that gradients are clipped to; null does not clip."
    )


class KL(Section):
    """Divergence of the student's token distribution from the teacher's."""

    reduction: Literal["token", "paper"] = Field(
        default="token",
        description="token: mean over the scored tokens of the global batch; paper: sum over all "
        "positions divided by the batch size, as the authors' code does.",
    )
    mask: Literal["all", "answer"] = Field(
        default="all", description="Positions that are scored: all but padding, or answers only."
    )
    temperature: float = Field(default=1.0, gt=0, le=100, description="Divides the logits of both.")
    direction: Literal["forward", "reverse", "jsd"] = Field(
        default="forward",
        description="KL(teacher || student), KL(student || teacher), or their JSD.",
    )
    ce_weight: Share = Field(
        default=0.0, description="Weight w of cross-entropy on the data: (1 - w) KL + w CE."
    )


class LoRA(Section):
    """Low-rank adapters in the place of direct training of the matrices they sit on."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of each adapter.")
    alpha: float = Field(
        default=32.0, gt=0, description="Scale; the update is multiplied by alpha / rank."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    targets: tuple[Text, ...] = Field(
        default=("q_proj", "k_proj", "v_proj"),
        strict=False,
        min_length=1,
        description="Matrices of the mixer that get an adapter.",
    )


class Stage(Section):
    """One stage of distillation as a value: what learns, which loss, whose hidden states."""

    name: StageName = Field(
        description="Names products and settings: stages.<name>.lr. Unique within the recipe."
    )
    learns: Learns = Field(
        description="new: parameters that the teacher lacks; new+qkv: W_Q, W_K, W_V too; or a "
        "list of patterns of parameter names."
    )
    loss: Literal["mixer-mse", "kl", "matrix-orientation", "hidden-alignment"] = Field(
        description="mixer-mse: mixer outputs before W_O; kl: logits; matrix-orientation: mixing "
        "matrices, Frobenius; hidden-alignment: outputs of whole layers (both MOHAWK)."
    )
    inputs: Literal["teacher", "student"] = Field(
        description="Whose hidden states each layer reads."
    )
    layers: Literal["all", "planned"] = Field(
        default="all",
        description="all: every layer is linear; planned: the recipe's attention layers hold the "
        "teacher's attention, from this stage on.",
    )
    steps: int = Field(ge=1, le=10**9, description="Optimiser steps.")
    batch_size: int = Field(
        ge=1, le=2**20, description="Samples per optimiser step, over all ranks and accumulation."
    )
    lr: float = Field(gt=0, le=1, description="Peak learning rate.")
    loss_scale: float = Field(default=1.0, gt=0, description="The loss is multiplied by this.")
    loss_weights: Literal["none", "density"] = Field(
        default="none",
        description="In a layer loss: density: tokens unlike their neighbours in a picture weigh "
        "more.",
    )
    train: Text | None = Field(
        default=None, description="Conversations of this stage; null takes data.train."
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        le=2**20,
        description="Longest sequence of this stage; null takes the data's.",
    )
    schedule: Schedule = Field(default=Schedule(), description="Learning rate over the steps.")
    optimiser: Optimiser = Field(default=Optimiser(), description="AdamW and clipping.")
    accumulation: int = Field(
        default=1,
        ge=1,
        le=2**20,
        description="Parts that a batch is computed in; divides batch_size.",
    )
    checkpointing: Checkpointing = Field(
        default=True,
        description="Compute activations again in the backward pass of a kl stage: far less "
        "memory, and more time. auto: on a GPU in as many layers as a measured step needs, on a "
        "CPU in none.",
    )
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Of matrix products; master weights and states are fp32 always."
    )
    kl: KL | None = Field(
        default=None, description="The divergence; for loss: kl only, null otherwise."
    )
    trainable: Literal["default", "paper"] = Field(
        default="default",
        description="paper: leave the vectors of the decay (A_log and dt_bias, or decay_bias) out "
        "wherever the loss is kl, as the authors' code does.",
    )
    lora: LoRA | None = Field(default=None, description="Adapters; for loss: kl only.")
    evaluate_every: int | None = Field(
        default=500, ge=1, description="Steps between held-out evaluations; null: at the end only."
    )
    save_every: int | None = Field(
        default=500, ge=1, description="Steps between saved training states; null: at the end only."
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        # Added explicitly, so that a resolved recipe shows the settings of a kl stage.
        if isinstance(values, dict) and values.get("loss") == "kl" and values.get("kl") is None:
            return {**values, "kl": {}}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.loss == "kl" and self.inputs == "teacher":
            raise invalid_value("is teacher, must be student: loss kl runs end to end", "inputs")
        for field in ("kl", "lora"):
            if self.loss != "kl" and getattr(self, field) is not None:
                raise invalid_value(
                    f"is given, must be null or left out: the loss is {self.loss}", field
                )
        if self.loss == "kl" and self.loss_weights != "none":
            raise invalid_value(
                f"is {self.loss_weights}, must be none or left out: the loss is kl", "loss_weights"
            )
        if self.batch_size % self.accumulation:
            raise invalid_value(
                f"is {self.accumulation}, must divide batch_size, which is {self.batch_size}",
                "accumulation",
            )
        return self


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
                    "is all, must be planned: an earlier stage put attention back",
                    "stages",
                    position,
                    "layers",
                )
            first_seen[stage.name] = position
            planned = stage.layers == "planned"
        return self
