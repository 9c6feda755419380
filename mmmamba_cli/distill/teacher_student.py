"""A teacher and its student in memory, every frozen tensor of the student being the teacher's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmmamba_cli.checkpoint import Checkpoint, expected_tensors, stored_dtype
from mmmamba_cli.checkpoint.tensor_io import cast
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.model import HolisticVLM


@dataclass(frozen=True)
class Pair:
    """Teacher and student on one device; `precision` is that of matrix products, bf16 or fp32."""

    teacher: HolisticVLM
    student: HolisticVLM
    precision: str = "fp32"
    # Names of the student's parameters that learn.
    learning: tuple[str, ...] = field(default=())

    @property
    def device(self) -> torch.device:
        return self.teacher.lm_head.weight.device

    def autocast(self) -> AbstractContextManager[None]:
        """Where forward passes run: bf16 products over fp32 master weights, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def learning_parameters(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name] for name in self.learning}


def load_pair(
    teacher: Checkpoint,
    student: Checkpoint,
    learning: Collection[str],
    *,
    product_dtype: torch.dtype,
    precision: str,
    device: torch.device,
) -> Pair:
    """Read both, tensor by tensor; what learns becomes an fp32 master weight of the student's own.

    A frozen tensor of the student that equals the teacher's, after the cast that seeding made
    (`product_dtype`), is the teacher's object in memory. The models are in eval mode; nothing but
    `learning` requires gradients.
    """
    frozen_dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def place(name: str, tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
        placed = cast(tensor, stored_dtype(name, dtype), name, device)
        return nn.Parameter(placed, requires_grad=False)

    theirs: dict[str, nn.Parameter] = {}
    ours: dict[str, nn.Parameter] = {}
    in_student = expected_tensors(student.config)
    for name in {**expected_tensors(teacher.config), **in_student}:
        taught = None
        if name in teacher:
            taught = cast(teacher.read(name), stored_dtype(name, product_dtype), name)
            theirs[name] = place(name, taught, frozen_dtype)
        if name not in in_student:
            continue
        tensor = student.read(name)
        if name in learning:
            ours[name] = place(name, tensor, torch.float32)
            ours[name].requires_grad_()
        elif taught is not None and torch.equal(tensor, taught):
            ours[name] = theirs[name]
        else:
            ours[name] = place(name, tensor, frozen_dtype)
    return Pair(_build(teacher, theirs), _build(student, ours), precision, tuple(sorted(learning)))


def _build(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> HolisticVLM:
    with torch.device("meta"):
        model = HolisticVLM(checkpoint.config)
    tied = checkpoint.config.tie_word_embeddings
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
    if tied:
        model.tie_weights()
    lost = [name for name, p in model.named_parameters() if p.is_meta]
    if lost:
        raise MmmambaError(f"no tensor was read for {', '.join(lost[:10])}")
    return model.eval()
