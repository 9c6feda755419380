"""The small HoVLE teacher for `train.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from architecture import random_teacher, teacher_config
from batches import LARGE, LESSON, MANY, TEXT
from learning import answer_logits
from prompts import HovlePrompts
from saving import read_teacher, write_teacher
from torch import Tensor
from vocabulary import corpus, train_tokenizer, write_tokenizer

from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.processing.tiling import IMAGENET_MEAN, IMAGENET_STD
from mmmamba_evals.scenes.world import World


class HovleTeacher:
    """HoVLE with 2 + 6 layers and 7 M parameters."""

    kinds: ClassVar = {
        LESSON: (0.84, 0.78),
        LARGE: (0.03, 0.06),
        MANY: (0.03, 0.08),
        TEXT: (0.10, 0.08),
    }
    mean, deviation = IMAGENET_MEAN, IMAGENET_STD

    def prompts(self, folder: Path, world: World, seed: int) -> HovlePrompts:
        """Write the tokenizer to `folder`, unless it is there: its training takes a while."""
        file = folder / "tokenizer.model"
        model = file.read_bytes() if file.is_file() else train_tokenizer(corpus(world, seed))
        return HovlePrompts(model, write_tokenizer(folder, model))

    def model(self, prompts: HovlePrompts, given: argparse.Namespace) -> HolisticVLM:
        self._raw: dict[str, Any] = teacher_config(
            prompts.special, max(prompts.special.values()) + 1
        )
        model = random_teacher(self._raw, given.seed)
        if given.begin is not None:
            read_teacher(given.begin, model)
        return model

    def blocks(self, model: HolisticVLM) -> Iterable[torch.nn.Module]:
        return model.model.blocks

    def logits(self, model: HolisticVLM, **inputs: Any) -> Tensor:
        return answer_logits(model, **inputs)

    def early_loss(self, model: HolisticVLM, step: int, pixels: Tensor | None) -> None:
        """None: every step learns answers."""
        return

    def write(self, folder: Path, model: HolisticVLM) -> None:
        write_teacher(folder, self._raw, model)
