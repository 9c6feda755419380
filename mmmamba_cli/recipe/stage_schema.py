"""Schema of a stage of a recipe: what learns, its loss, schedule, optimiser and adapters.

Defaults are the paper's (mmMamba, arXiv 2502.13145) where it gives a number. Fields without a
default must be set for each stage: parameters, loss, steps, batch size, learning rate.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mmmamba_cli.recipe.problems import Allowed, format_value
from mmmamba_cli.recipe.section import Section, Share, Text, invalid_value

Beta = Annotated[float, Field(ge=0, lt=1)]

LEARNS_ALLOWED = Allowed(
    "new, new+qkv, or a list of patterns of parameter names, as ['*.mixer.A_log']"
)
MAX_ACCUMULATION = 2**20
ACCUMULATION_ALLOWED = Allowed(f"a whole number at least 1 and at most {MAX_ACCUMULATION}, or auto")
CHECKPOINTING_ALLOWED = Allowed("true, false or auto")
STAGE_NAME_ALLOWED = Allowed(
    "a name of lower-case letters, digits, '-' and '_' that begins with a letter"
)


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


def _check_accumulation(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_ACCUMULATION:
        return value
    raise invalid_value(f"is {format_value(value)}, must be {ACCUMULATION_ALLOWED.words}")


def _check_checkpointing(value: Any) -> bool | str:
    if isinstance(value, bool) or value == "auto":
        return value
    raise invalid_value(f"is {format_value(value)}, must be {CHECKPOINTING_ALLOWED.words}")


def _check_stage_name(value: Any) -> str:
    # Lower-case ASCII, since stage names become names of products and folders.
    if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", value):
        return value
    raise invalid_value(f"is {format_value(value)}, must be {STAGE_NAME_ALLOWED.words}")


Accumulation = Annotated[
    int | Literal["auto"], BeforeValidator(_check_accumulation), ACCUMULATION_ALLOWED
]
Checkpointing = Annotated[
    bool | Literal["auto"], BeforeValidator(_check_checkpointing), CHECKPOINTING_ALLOWED
]
StageName = Annotated[str, BeforeValidator(_check_stage_name), STAGE_NAME_ALLOWED]
Learns = Annotated[
    Literal["new", "new+qkv"] | tuple[str, ...], BeforeValidator(_check_learns), LEARNS_ALLOWED
]


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

    @model_validator(mode="after")
    def _check_mask(self) -> Self:
        if self.reduction == "paper" and self.mask != "all":
            raise invalid_value(
                f"is {self.mask}, must be all or left out: reduction paper sums over all positions",
                "mask",
            )
        return self


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
    accumulation: Accumulation = Field(
        default=1,
        description="Micro batches that the batch of a process is computed in: a number that "
        "divides batch_size, or auto: in each step as few as the sizes of its rows allow.",
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
        if self.accumulation != "auto" and self.batch_size % self.accumulation:
            raise invalid_value(
                f"is {self.accumulation}, must divide batch_size, which is {self.batch_size}, or "
                "be auto",
                "accumulation",
            )
        return self
