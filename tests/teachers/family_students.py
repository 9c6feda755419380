"""Students of the tiny teachers of `families`, whose new parameters are random too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from families import FAMILIES, LAYERS, Family, picture
from PIL import Image
from transformers import PreTrainedModel

from mmmamba_cli.teachers import StudentPlan, convert, mixers_of

Rows = list[tuple[str, Sequence[Image.Image]]]

# Layer 0 is replaced in every plan: transformers asks it for the length of a cache.
HYBRID = (0, 2)
ALL_LINEAR = tuple(range(LAYERS))
PLANS = {
    "hybrid mamba2": (HYBRID, "mamba2"),
    "hybrid gated_delta": (HYBRID, "gated_delta"),
    "all mamba2": (ALL_LINEAR, "mamba2"),
    "all gated_delta": (ALL_LINEAR, "gated_delta"),
}


@cache
def student(family: str, plan: str) -> PreTrainedModel:
    """The student of a family's teacher by a plan of `PLANS`, in eval mode and float64.

    Float64 separates faults from rounding: in float32 a chunked scan and its recurrence differ by
    up to 1e-4 at the logits of these models.
    """
    layers, mixer = PLANS[plan]
    model = convert(
        FAMILIES[family].model(),
        StudentPlan.of_layers(LAYERS, layers, mixer),
        allow_bidirectional=True,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in mixers_of(model):
            for _, _, parameter in module.new_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter))
    return model.double()


def rows_of(family: Family) -> Rows:
    """One picture, two of unequal size, and Chinese text alone; three texts without pictures."""
    if not family.pictures:
        return [("What is it?", []), ("Count the words of every line.", []), ("请描述红色。", [])]
    return [
        ("What is it?", [picture(24, 16)]),
        ("Compare them.", [picture(40, 12, seed=1), picture(16, 32, seed=2)]),
        ("请描述红色。", []),
    ]


def text_rows() -> Rows:
    return [("How many?", []), ("Count the words of every line.", [])]


def has_padding_invariance(family: Family, plan: str) -> bool:
    """Whether the logits of a row can be independent of padding: attention may depend on it."""
    return family.padding_invariant or PLANS[plan][0] == ALL_LINEAR


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with pixels in float64."""
    return {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def greedy(model: Any, family: Family, inputs: dict[str, Any], **options: Any) -> Any:
    """`generate` with scores, (batch, new tokens, vocabulary), and the new tokens."""
    found = model.generate(
        **double(inputs),
        **family.generation(new_tokens=5) | options,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(found.scores, 1)
    # Suppressed tokens have minus infinity, which no tolerance compares.
    return found.sequences[:, -5:], scores.clamp_min(-1e4)
