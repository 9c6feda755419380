"""HolisticVLM against itself and, where there is one, another implementation.

HoVLE has no class in transformers. A language model has one, and its logits are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.architecture import (
    LINEAR,
    mixer_spec,
    mixer_specs,
    parameter_shapes,
)
from mmmamba_cli.checkpoint import Checkpoint, open_source, stored_dtype
from mmmamba_cli.model import HolisticVLM, HolisticVLMConfig
from mmmamba_cli.seed.initial_values import initial_value
from mmmamba_cli.teachers.mixer_plan import ATTENTION_MIXER
from mmmamba_cli.verification.comparison import (
    allowed_distance,
    logits_of,
    relative_distance,
)
from mmmamba_cli.verification.prompts import Inputs
from mmmamba_cli.verification.report import DIFFERENT, OK, SKIPPED, CheckResult

EAGER, GOLDEN, OUTPUTS = "eager attention", "golden values", "HolisticVLM"
# Beside the weights: input.input_ids, input.pixel_values and teacher.logits of a reference.
GOLDEN_FILE = "golden.safetensors"
REPLACED_LAYER = 0
MIMIC = "inherit+mimic"


def compare_logits(
    name: str, model: Any, inputs: Inputs, expected: Tensor, reference: str, own: float = 0.0
) -> CheckResult:
    """The logits of a model and those of another implementation, which may round differently.

    `own` is the distance of the other implementation from itself, by which the tolerance grows.
    """
    found = logits_of(model, inputs).cpu()[:, -expected.shape[1] :]
    distance = relative_distance(found, expected.cpu()[:, -found.shape[1] :])
    allowed = allowed_distance(model.dtype, own)
    detail = (
        f"relative distance of logits to {reference} {distance:.1e} (allowed {allowed:.1e}; "
        f"{inputs['input_ids'].shape[1]} tokens)"
    )
    # NaN is not below any tolerance.
    return CheckResult(name, OK if distance <= allowed else DIFFERENT, detail)


def check_eager(model: Any, inputs: Inputs) -> CheckResult:
    """Attention as plain PyTorch with all scores, against the backend that the model uses."""
    used = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        expected = logits_of(model, inputs)
    finally:
        model.config._attn_implementation = used
    return compare_logits(EAGER, model, inputs, expected, f"those of {used}")


def replacing_mixers() -> list[str]:
    """The mixers that can take the place of attention."""
    return [name for name in mixer_specs() if name != ATTENTION_MIXER]


def student_of(model: HolisticVLM, mixer: str) -> HolisticVLM:
    """A student with `mixer` in the first layer, which shares the other weights with `model`."""
    config: Any = model.config
    mixers = list(config.mixer_names)
    mixers[REPLACED_LAYER] = mixer
    kinds = [mixer_spec(name).layer_type for name in mixers]
    own = HolisticVLMConfig.from_dict(
        {**config.to_dict(), "layer_types": kinds, "mixers": mixers, "mixer": {}}
    )
    with torch.device("meta"):
        student = HolisticVLM(own)
    shared, state = model.state_dict(), {}
    for name, shape in parameter_shapes(own).items():
        if name in shared and tuple(shared[name].shape) == shape:
            state[name] = shared[name]
            continue
        value = initial_value(name, shape, mixer, MIMIC, seed=0)
        state[name] = value.to(model.device, stored_dtype(name, model.dtype))
    student.load_state_dict(state, strict=not own.tie_word_embeddings, assign=True)
    student.tie_weights()
    student.config.dtype = model.dtype
    student.generation_config = model.generation_config
    return student.requires_grad_(False).eval()


def check_golden(model: Any, folder: Path) -> CheckResult:
    """Logits that a reference implementation gave, if the folder has them."""
    file = folder / GOLDEN_FILE
    if not file.is_file():
        return CheckResult(
            GOLDEN,
            SKIPPED,
            f"there is no {GOLDEN_FILE} in the folder: not compared with another implementation",
        )
    with open_source(file) as source:
        needed = ("input.input_ids", "teacher.logits")
        missing = [name for name in needed if name not in source.names]
        if missing:
            return CheckResult(GOLDEN, DIFFERENT, f"{file.name} has no tensor {missing[0]}")
        inputs = {"input_ids": source.read(needed[0])}
        if "input.pixel_values" in source.names:
            inputs["pixel_values"] = source.read("input.pixel_values")
        return compare_logits(GOLDEN, model, inputs, source.read(needed[1]), file.name)


def linear_shapes(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of a student with the default mixer in every layer, and of what the teacher lacks."""
    layers = checkpoint.config.num_hidden_layers
    own = HolisticVLMConfig.from_dict(
        {**checkpoint.config.to_dict(), "layer_types": [LINEAR] * layers, "mixers": None}
    )
    shapes = parameter_shapes(own)
    return shapes, {name: shape for name, shape in shapes.items() if name not in checkpoint}
