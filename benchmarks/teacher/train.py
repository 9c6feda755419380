"""Train the small teacher on composed scenes, in minutes on one GPU, reproducible from a seed.

    python benchmarks/teacher/train.py --atlas STYLE_FOLDER --out FOLDER [--steps N]

Writes a HoVLE folder to FOLDER/teacher. The training state is stored in FOLDER/state.pt; an
interrupted run resumes from it. The shipped atlas is always included; --atlas adds further styles.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from architecture import random_teacher, teacher_config
from batches import CATEGORIES, LARGE, LESSON, MANY, TEXT, Batcher, Lessons
from learning import Pictures, answer_logits, answer_loss, uses_branches
from saving import load_state, read_teacher, save_state, write_teacher
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vocabulary import corpus, train_tokenizer, write_tokenizer
from world import training_world

from mmmamba_cli.model import HolisticVLM
from mmmamba_evals.scenes.augmentation import Augmentation
from mmmamba_evals.scenes.fonts import SEEN, UNSEEN, fonts_of
from mmmamba_evals.scenes.gpu import BatchRenderer, SceneEncoder, to_device
from mmmamba_evals.scenes.shipped import UNSEEN_STYLE, shipped_atlas
from mmmamba_evals.scenes.world import World, make_world

# Probability of each kind of step in the first and in the second half of the training.
KINDS = {LESSON: (0.84, 0.78), LARGE: (0.03, 0.06), MANY: (0.03, 0.08), TEXT: (0.10, 0.08)}
# Largest number of pictures of a long step, reached at the end.
LONGEST = 64
WARMUP, FINAL = 200, 0.01
HELD_OUT_STEP = -1


class Steps(Dataset[Lessons]):
    """Batch `step` of the run, computed on access."""

    def __init__(self, batcher: Batcher, steps: int, pictures: int):
        self.batcher, self.steps, self.pictures = batcher, steps, pictures

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Lessons:
        rng = Random(f"{self.batcher.seed} kind {step}")
        half = int(2 * step >= self.steps)
        kind = rng.choices(list(KINDS), [share[half] for share in KINDS.values()])[0]
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
    """Arguments of `answer_logits` other than the pixels."""
    names = ("ids", "positions", "columns")
    found: dict[str, Tensor | None] = {
        name: to_device(getattr(lessons, name), device) for name in names
    }
    found["branch"] = to_device(lessons.branch, device) if uses_branches(lessons) else None
    return found


@torch.no_grad()
def held_out_accuracy(
    model: HolisticVLM, lessons: Lessons, pictures: Pictures, device: torch.device
) -> dict[str, float]:
    """Accuracy of the first answer token by category; `name?` has the yes-or-no questions."""
    pixels = pictures(lessons, None, None)
    with torch.autocast(device.type, torch.bfloat16):
        logits = answer_logits(model, **inputs_of(lessons, device), pixels=pixels)
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


def held_out(given: argparse.Namespace, tokenizer: bytes, special: dict[str, int]) -> list[Any]:
    """(name, lessons, renderer) of the seen style and of an unseen one."""
    found = []
    for name, atlas, split in (
        ("seen", shipped_atlas(), SEEN),
        ("unseen", shipped_atlas(UNSEEN_STYLE), UNSEEN),
    ):
        world = make_world(atlas, fonts_of(split))
        layouter = SceneEncoder(atlas, world)
        batcher = Batcher(tokenizer, special, layouter, world, given.seed)
        pictures = Pictures(BatchRenderer(layouter, given.device))
        found.append((name, batcher.lessons(HELD_OUT_STEP, given.held_out), pictures))
    return found


def the_tokenizer(given: argparse.Namespace, world: World) -> bytes:
    """The existing tokenizer, or a new one, whose training takes a while."""
    file = given.out / "teacher" / "tokenizer.model"
    return file.read_bytes() if file.is_file() else train_tokenizer(corpus(world, given.seed))


def train(given: argparse.Namespace) -> None:
    device = torch.device(given.device)
    atlas, world = training_world(given.atlas)
    tokenizer = the_tokenizer(given, world)
    special = write_tokenizer(given.out / "teacher", tokenizer)
    raw = teacher_config(special, max(special.values()) + 1)
    model = random_teacher(raw, given.seed).to(device)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    layouter = SceneEncoder(atlas, world)
    batcher = Batcher(tokenizer, special, layouter, world, given.seed)
    pictures = Pictures(BatchRenderer(layouter, device))
    optimiser = build_optimiser(model, given.lr)
    if given.begin is not None:
        read_teacher(given.begin, model)
    first = load_state(given.out, model, optimiser)
    loader = DataLoader(
        Steps(batcher, given.steps, given.pictures),
        batch_size=None,
        sampler=range(first, given.steps),
        num_workers=given.workers,
        prefetch_factor=6 if given.workers else None,
    )
    if given.compile:
        # Per block, so that all blocks share one compiled graph.
        for block in model.model.blocks:
            block.compile()
    tests = held_out(given, tokenizer, special)
    began = time.perf_counter()
    for step, lessons in enumerate(loader, start=first):
        generator = torch.Generator(device).manual_seed(given.seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, given.steps, given.lr)
        line = learn(model, optimiser, lessons, pictures(lessons, Augmentation(), generator))
        if step % 50 == 0:
            seconds = round(time.perf_counter() - began, 1)
            line = {key: round(float(value), 4) for key, value in line.items()}
            print(
                json.dumps({"step": step, "kind": lessons.kind, **line, "s": seconds}), flush=True
            )
        if (step + 1) % given.every == 0 or step + 1 == given.steps:
            for name, test, drawn in tests:
                print(name, json.dumps(held_out_accuracy(model, test, drawn, device)), flush=True)
            save_state(given.out, model, optimiser, step + 1)
            write_teacher(given.out / "teacher", raw, model)


def build_optimiser(model: HolisticVLM, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=model.device.type == "cuda")


def learn(
    model: HolisticVLM, optimiser: torch.optim.Optimizer, lessons: Lessons, pixels: Tensor | None
) -> dict[str, Tensor]:
    """Take one optimiser step; returns its loss and gradient norm."""
    device = model.device
    with torch.autocast(device.type, torch.bfloat16):
        logits = answer_logits(model, **inputs_of(lessons, device), pixels=pixels)
    targets, weights = (to_device(x, device) for x in (lessons.targets, lessons.weights))
    loss = answer_loss(logits, targets, weights)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atlas", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begin", type=Path, help="initial teacher, with the same tokenizer")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=512, help="pictures per step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--held-out", type=int, default=512, help="held-out pictures")
    parser.add_argument("--every", type=int, default=500, help="steps between held-out tests")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
