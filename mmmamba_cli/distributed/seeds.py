"""Random numbers that depend on where one is, not on how one got there."""

import hashlib
import random

import torch


def step_seed(seed: int, *place: str | int) -> int:
    """A 63-bit seed from the run's seed and a place such as ("stage1", step, rank)."""
    text = "/".join(map(str, (seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's generator and torch's on every device."""
    random.seed(seed)
    torch.manual_seed(seed)
