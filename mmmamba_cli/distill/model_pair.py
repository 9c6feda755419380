"""The interface of teacher and student in memory, for all kinds of models."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmmamba_cli.data import Batch, ModelBatch

AnyBatch = Batch | ModelBatch


@dataclass(frozen=True)
class PairPlacement:
    """Dtypes and device of teacher and student in memory.

    Attributes:
        product_dtype: of the student's product; seeding cast the teacher's tensors to it.
        precision: of matrix products, bf16 or fp32.
    """

    product_dtype: torch.dtype
    precision: str
    device: torch.device

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of parameters that do not learn; those that learn are fp32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class ModelPair(Protocol):
    """Teacher and student on one device; matrix products run in `precision`, bf16 or fp32.

    `trainable` are names of the student's trainable parameters. `prepare`, `last_hidden` and
    `logits` are the parts of a forward pass: logits of chosen columns need not exist at once.
    """

    @property
    def teacher(self) -> Any: ...

    @property
    def student(self) -> Any: ...

    @property
    def precision(self) -> str: ...

    @property
    def trainable(self) -> tuple[str, ...]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def mixers(self) -> tuple[nn.Module, ...]:
        """The student's mixers, in the order of its layers."""
        ...

    @property
    def lm_head(self) -> nn.Linear:
        """The student's head."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """Context of forward passes: bf16 products over fp32 master weights; no-op in fp32."""
        ...

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The student's trainable parameters by name."""
        ...

    def with_trainable(self, names: Iterable[str]) -> ModelPair:
        """The same models with other trainable parameters."""
        ...

    @property
    def checkpointable_layers(self) -> tuple[nn.Module, ...]:
        """The student's layers that can recompute their activations, in order."""
        ...

    def checkpoint_layers(self, count: int) -> None:
        """Recompute in the backward pass the activations of the first `count` layers.

        Those of the other layers are kept.
        """
        ...

    def prepare(self, batch: Any) -> Any:
        """What both models read of a batch on their device."""
        ...

    def last_hidden(self, model: Any, prepared: Any) -> Tensor:
        """The input (B, T, D) of the head of `model`, the teacher or the student."""
        ...

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Logits (N, V) of rows of `last_hidden` (N, D)."""
        ...
