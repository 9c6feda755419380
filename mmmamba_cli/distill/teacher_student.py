"""Teacher and student of class `HolisticVLM` in memory; equal frozen tensors are shared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import cast as typing_cast

import torch
from torch import Tensor, nn

from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import Checkpoint, stored_dtype
from mmmamba_cli.checkpoint.tensor_io import cast
from mmmamba_cli.data import Batch
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.prepared_inputs import PreparedInputs, describe_tiles


@dataclass(frozen=True)
class TeacherStudent:
    """A `ModelPair` of class `HolisticVLM`."""

    teacher: HolisticVLM
    student: HolisticVLM
    precision: str = "fp32"
    # Names of the student's trainable parameters.
    trainable: tuple[str, ...] = field(default=())

    @property
    def device(self) -> torch.device:
        return self.teacher.lm_head.weight.device

    def autocast(self) -> AbstractContextManager[None]:
        """Context of forward passes: bf16 products over fp32 master weights; no-op in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name] for name in self.trainable}

    @property
    def mixers(self) -> tuple[nn.Module, ...]:
        return tuple(typing_cast(nn.Module, block.mixer) for block in self.student.model.blocks)

    @property
    def lm_head(self) -> nn.Linear:
        return self.student.lm_head

    def with_trainable(self, names: Iterable[str]) -> TeacherStudent:
        return replace(self, trainable=tuple(sorted(names)))

    @property
    def checkpointable_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.student.model.blocks)

    def checkpoint_layers(self, count: int) -> None:
        self.student.model.checkpoint_layers(count > 0)
        for block in self.student.model.blocks[count:]:
            block.gradient_checkpointing = False

    def last_hidden(self, model: HolisticVLM, prepared: PreparedInputs) -> Tensor:
        return model.model.forward_prepared(prepared)

    def logits(self, model: HolisticVLM, hidden: Tensor) -> Tensor:
        logits: Tensor = model.lm_head(hidden)
        return logits

    def prepare(self, batch: Batch) -> PreparedInputs:
        """Embed and lay out a batch; the result is the same for teacher and student."""
        prompt = self.teacher.model.prepare(
            batch.input_ids,
            batch.pixel_values,
            batch.attention_mask,
            batch.seq_idx,
            host_ids=None if batch.on_host is None else batch.on_host.input_ids,
        )
        prompt = describe_tiles(self.student.config, prompt)
        if batch.varlen is None:
            return prompt
        embedding = prompt.embedding_layout
        # Where patches replace image tokens, the embedding stack has its own columns.
        if embedding is not None and prompt.expansion is None:
            embedding = replace(embedding, precomputed_varlen=batch.varlen)
        language = replace(prompt.language_layout, precomputed_varlen=batch.varlen)
        return replace(prompt, embedding_layout=embedding, language_layout=language)


def load_teacher_student(
    teacher: Checkpoint,
    student: Checkpoint,
    trainable: Collection[str],
    placement: PairPlacement,
) -> TeacherStudent:
    """Load both models, tensor by tensor; the `trainable` parameters become fp32 master weights.

    A frozen tensor of the student shares the teacher's memory if both are equal after the cast to
    `placement.product_dtype` that seeding made. The models are in eval mode, and only `trainable`
    parameters require gradients.
    """
    frozen_dtype, product_dtype = placement.frozen_dtype, placement.product_dtype

    def place(name: str, tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
        placed = cast(tensor, stored_dtype(name, dtype), name, placement.device)
        return nn.Parameter(placed, requires_grad=False)

    teacher_parameters: dict[str, nn.Parameter] = {}
    student_parameters: dict[str, nn.Parameter] = {}
    in_student = parameter_shapes(student.config)
    for name in {**parameter_shapes(teacher.config), **in_student}:
        cast_tensor = None
        if name in teacher:
            cast_tensor = cast(teacher.read(name), stored_dtype(name, product_dtype), name)
            teacher_parameters[name] = place(name, cast_tensor, frozen_dtype)
        if name not in in_student:
            continue
        tensor = student.read(name)
        if name in trainable:
            student_parameters[name] = place(name, tensor, torch.float32)
            student_parameters[name].requires_grad_()
        elif cast_tensor is not None and torch.equal(tensor, cast_tensor):
            student_parameters[name] = teacher_parameters[name]
        else:
            student_parameters[name] = place(name, tensor, frozen_dtype)
    return TeacherStudent(
        _build(teacher, teacher_parameters),
        _build(student, student_parameters),
        placement.precision,
        tuple(sorted(trainable)),
    )


def _build(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> HolisticVLM:
    with torch.device("meta"):
        model = HolisticVLM(checkpoint.config)
    tied = checkpoint.config.tie_word_embeddings
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    if tied:
        model.tie_weights()
    unset = [name for name, p in model.named_parameters() if p.is_meta]
    if unset:
        raise MmmambaError(f"no tensor was read for {', '.join(unset[:10])}")
    return model.eval()
