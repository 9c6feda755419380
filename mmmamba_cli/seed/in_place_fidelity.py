"""Fidelity of the mixers of a student of a transformers model, on the running teacher.

The teacher computes its own forward pass. Hooks give each mixer the input of the attention that it
replaces, and compare both outputs before W_O. Legend: B rows, T columns, H heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import InPlaceCheckpoint, load_in_place_model
from mmmamba_cli.devices import require_memory
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing.family_prompts import encode_conversation
from mmmamba_cli.seed.calibrated_start import FidelitySums
from mmmamba_cli.seed.fidelity import (
    QUESTIONS,
    TEXTS,
    LayerFidelity,
    calibration_drawing,
    question_message,
    read_samples,
)
from mmmamba_cli.teachers import CallContext, mixers_of
from mmmamba_cli.teachers.anatomy import meta_model, text_decoder
from mmmamba_cli.teachers.auto_class import register_model

Inputs = Mapping[str, Any]


def in_place_calibration(
    teacher: InPlaceCheckpoint, processor: Any, file: Path | None = None
) -> list[Inputs]:
    """Inputs of the model for two questions about a drawing, or two texts; or for those of `file`.

    Raises:
        DataError: a line or a picture that cannot be read, or no chat template.
    """
    has_vision = teacher.has_vision
    if file is not None:
        samples = read_samples(file)
    elif has_vision:
        samples = [(question, [calibration_drawing()]) for question in QUESTIONS]
    else:
        samples = [(text, []) for text in TEXTS]
    return [
        encode_conversation(
            processor, question_message(text, len(images)), images, has_vision=has_vision
        )
        for text, images in samples
    ]


@torch.no_grad()
def measure_in_place_fidelity(
    teacher: InPlaceCheckpoint,
    student: InPlaceCheckpoint,
    calibration: Sequence[Inputs],
    advance: Callable[[int], None] | None = None,
) -> list[LayerFidelity]:
    """Compare each mixer in fp32 with the teacher, which is loaded whole in its stored dtype.

    Raises:
        OutOfMemory: the teacher does not fit.
        CheckpointError: outputs that are not finite.
    """
    nbytes = sum(teacher.info(name).nbytes for name in teacher.source.names)
    require_memory(torch.device("cpu"), nbytes, "the teacher, for the comparison with its student")
    model: Any = load_in_place_model(teacher, frozen=True)
    decoder, context = text_decoder(model), CallContext()
    context.attach(*{id(one): one for one in (model, model.base_model, decoder)}.values())
    config = student.config
    config_class: Any = type(config)
    outline = meta_model(register_model(config_class), config)
    names = {id(module): name for name, module in outline.named_modules()}
    stored = {own: name for name, own in student.layout.names.items()}
    sums: dict[int, FidelitySums] = {}
    for mixer in mixers_of(outline):
        layer = mixer.layer_idx
        sums[layer] = FidelitySums()
        prefix = names[id(mixer)]

        def read(name: str, prefix: str = prefix) -> Tensor:
            return student.read(stored[f"{prefix}.{name}"]).float()

        probe = _Probe(mixer, read, context, sums[layer], advance)
        probe.attach(decoder.layers[layer].self_attn)
    for inputs in calibration:
        model(**_in_dtype(inputs, model.dtype), use_cache=False)
    return [_checked(layer, one) for layer, one in sorted(sums.items())]


class _Probe:
    """Compares a mixer with one attention module, whenever that is called."""

    def __init__(
        self,
        mixer: Any,
        read: Callable[[str], Tensor],
        context: CallContext,
        sums: FidelitySums,
        advance: Callable[[int], None] | None,
    ) -> None:
        self.mixer, self.read, self.context = mixer, read, context
        self.sums, self.advance = sums, advance
        self.expected: Tensor | None = None

    def attach(self, attention: Any) -> None:
        attention.o_proj.register_forward_pre_hook(self._keep_target)
        attention.register_forward_hook(self._compare, with_kwargs=True)

    def _keep_target(self, module: Any, args: tuple[Any, ...]) -> None:
        self.expected = args[0]

    def _compare(
        self, module: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any
    ) -> None:
        hidden = (args[0] if args else given["hidden_states"]).float()
        angles = given.get("position_embeddings")
        if angles is not None:
            angles = (angles[0].float(), angles[1].float())
        layout = self.context.layout(hidden, angles, uses_rope=self.mixer.uses_rope)
        # One mixer's weights at a time.
        state = {name: self.read(name) for name in self.mixer.state_dict()}
        self.mixer.load_state_dict(state, assign=True)
        actual = self.mixer.mix(hidden, layout, None)
        self.mixer.to("meta")
        assert self.expected is not None
        self.sums.add(actual, self.expected, layout.mask, self.mixer.head_dim)
        self.expected = None
        if self.advance is not None:
            self.advance(1)


def _in_dtype(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs with pictures in the model's dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _checked(layer: int, sums: FidelitySums) -> LayerFidelity:
    found = LayerFidelity(layer, sums.cosine, sums.relative_mse)
    if not all(abs(value) < float("inf") for value in (found.cosine, found.relative_mse)):
        raise CheckpointError(
            f"layer {layer} of the teacher gives NaN or infinity on the calibration samples",
            "check the weights with `mmmamba inspect`",
        )
    return found
