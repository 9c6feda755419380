"""Train the small teacher on composed scenes, in minutes on one GPU, reproducible from a seed.

    python benchmarks/teacher/train.py --atlas STYLE_FOLDER --out FOLDER [--steps N]
    python benchmarks/teacher/train.py --family smolvlm --begin scenes-teacher --out FOLDER

Writes a checkpoint to FOLDER/teacher. The training state is stored in FOLDER/state.pt; an
interrupted run resumes from it. After --minutes it saves and ends; the same command goes on. The
shipped atlas is always included; --atlas adds further styles.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from batches import CATEGORIES, LARGE, MANY, TEXT, Batcher, Lessons
from hovle_teacher import HovleTeacher
from learning import Pictures, answer_loss, uses_branches
from prompts import Prompts
from saving import load_state, save_state
from smolvlm_teacher import SmolvlmTeacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from world import training_world

from mmmamba_evals.scenes.augmentation import Augmentation
from mmmamba_evals.scenes.batch_renderer import BatchRenderer, SceneEncoder, to_device
from mmmamba_evals.scenes.fonts import SEEN, UNSEEN, fonts_of
from mmmamba_evals.scenes.shipped import UNSEEN_STYLE, shipped_atlas
from mmmamba_evals.scenes.world import make_world

TEACHERS = {"hovle": HovleTeacher, "smolvlm": SmolvlmTeacher}
Teacher = HovleTeacher | SmolvlmTeacher
# Probability of each kind of step in the first and in the second half of the training.
Kinds = dict[str, tuple[float, float]]
# Largest number of pictures of a long step, reached at the end.
LONGEST = 64
WARMUP, FINAL = 200, 0.01
HELD_OUT_STEP = -1


class Steps(Dataset[Lessons]):
    """Batch `step` of the run, computed on access."""

    def __init__(self, batcher: Batcher, kinds: Kinds, steps: int, pictures: int):
        self.batcher, self.kinds, self.steps, self.pictures = batcher, kinds, steps, pictures

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Lessons:
        rng = Random(f"{self.batcher.seed} kind {step}")
        half = int(2 * step >= self.steps)
        kind = rng.choices(list(self.kinds), [share[half] for share in self.kinds.values()])[0]
        # Curriculum: short inputs first, long ones later.
        longest = 2 + (LONGEST - 2) * (step / self.steps) ** 2
        each = round(math.exp(rng.uniform(math.log(2), math.log(longest))))
        if kind == LARGE:
            return self.batcher.large(step, self.pictures)
        if kind == MANY:
            return self.batcher.many(step, self.pictures, each)
        if kind == TEXT:
            return self.batcher.text(step, max(2, self.pictures // each), 4 * each)
        return self.batcher.lessons(step, self.pictures)


def inputs_of(lessons: Lessons, device: torch.device) -> dict[str, Tensor | None]:
    """Arguments of a teacher's `logits` other than the pixels."""
    names = ("ids", "positions", "columns")
    found: dict[str, Tensor | None] = {
        name: to_device(getattr(lessons, name), device) for name in names
    }
    found["branch"] = to_device(lessons.branch, device) if uses_branches(lessons) else None
    return found


def autocast(device: torch.device) -> Any:
    """bf16 on a GPU. A CPU without AVX-512 or AMX computes bf16 several times slower than fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


@torch.no_grad()
def held_out_accuracy(
    teacher: Teacher, model: nn.Module, lessons: Lessons, pictures: Pictures, device: torch.device
) -> dict[str, float]:
    """Accuracy of the first answer token by category; `name?` has the yes-or-no questions."""
    pixels = pictures(lessons, None, None)
    with autocast(device):
        logits = teacher.logits(model, **inputs_of(lessons, device), pixels=pixels)
    right = logits.argmax(-1).cpu().numpy() == lessons.targets
    found = {}
    for index, name in enumerate((*CATEGORIES, *(f"{name}?" for name in CATEGORIES))):
        asked = lessons.category == index
        if asked.any():
            found[name] = round(float(right[asked].mean()), 3)
    every = lessons.targets >= 0
    return {**found, "tokens": round(float(right[every].mean()), 4)}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine decay."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return peak * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)


def held_out(given: argparse.Namespace, teacher: Teacher, prompts: Prompts) -> list[Any]:
    """(name, lessons, renderer) of the seen style and of an unseen one."""
    found = []
    for name, atlas, split in (
        ("seen", shipped_atlas(), SEEN),
        ("unseen", shipped_atlas(UNSEEN_STYLE), UNSEEN),
    ):
        world = make_world(atlas, fonts_of(split))
        layouter = SceneEncoder(atlas, world)
        batcher = Batcher(prompts, layouter, world, given.seed)
        pictures = pictures_of(teacher, layouter, given.device)
        found.append((name, batcher.lessons(HELD_OUT_STEP, given.held_out), pictures))
    return found


def pictures_of(teacher: Teacher, layouter: SceneEncoder, device: Any) -> Pictures:
    return Pictures(BatchRenderer(layouter, device), teacher.mean, teacher.deviation)


def train(given: argparse.Namespace) -> None:
    began = time.perf_counter()
    device = torch.device(given.device)
    atlas, world = training_world(given.atlas)
    teacher, folder = TEACHERS[given.family](), given.out / "teacher"
    prompts = teacher.prompts(folder, world, given.seed)
    model = teacher.model(prompts, given).to(device)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    layouter = SceneEncoder(atlas, world)
    batcher = Batcher(prompts, layouter, world, given.seed)
    pictures = pictures_of(teacher, layouter, device)
    optimiser = build_optimiser(model, given.lr)
    first = load_state(given.out, model, optimiser)
    loader = DataLoader(
        Steps(batcher, teacher.kinds, given.steps, given.pictures),
        batch_size=None,
        sampler=range(first, given.steps),
        num_workers=given.workers,
        prefetch_factor=6 if given.workers else None,
    )
    if given.compile:
        # Per block, so that all blocks share one compiled graph.
        for block in teacher.blocks(model):
            block.compile()
    tests = held_out(given, teacher, prompts)
    for step, lessons in enumerate(loader, start=first):
        generator = torch.Generator(device).manual_seed(given.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, given.steps, given.lr)
        pixels = pictures(lessons, Augmentation(), generator)
        line = learn(teacher, model, optimiser, step, lessons, pixels)
        if step % 50 == 0:
            seconds = round(time.perf_counter() - began, 1)
            line = {key: round(float(value), 4) for key, value in line.items()}
            print(
                json.dumps({"step": step, "kind": lessons.kind, **line, "s": seconds}), flush=True
            )
        is_last = step + 1 == given.steps
        if not is_last and time.perf_counter() - began > 60 * given.minutes:
            save_state(given.out, model, optimiser, step + 1)
            teacher.write(folder, model)
            print(f"no time left: stopped after step {step + 1} of {given.steps}", flush=True)
            return
        if (step + 1) % given.every == 0 or is_last:
            for name, test, drawn in tests:
                scores = held_out_accuracy(teacher, model, test, drawn, device)
                print(name, json.dumps(scores), flush=True)
            save_state(given.out, model, optimiser, step + 1)
            teacher.write(folder, model)


def build_optimiser(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=lr, betas=(0.9, 0.98), fused=next(model.parameters()).is_cuda
    )


def learn(
    teacher: Teacher,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    lessons: Lessons,
    pixels: Tensor | None,
) -> dict[str, Tensor]:
    """Take one optimiser step; returns its loss and gradient norm."""
    device = next(model.parameters()).device
    with autocast(device):
        loss = teacher.early_loss(model, step, pixels)
        if loss is None:
            logits = teacher.logits(model, **inputs_of(lessons, device), pixels=pixels)
            targets, weights = (to_device(x, device) for x in (lessons.targets, lessons.weights))
            loss = answer_loss(logits, targets, weights)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "norm": norm}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atlas", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=TEACHERS, default="hovle")
    parser.add_argument(
        "--begin", type=Path, help="initial HoVLE teacher; of family hovle, with the same tokenizer"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=512, help="pictures per step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--held-out", type=int, default=512, help="held-out pictures")
    parser.add_argument("--every", type=int, default=500, help="steps between held-out tests")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


if __name__ == "__main__":
    train(parse())
