"""Small models for command tests: a run with a seeded student, and a language model."""

from __future__ import annotations

from pathlib import Path

import torch
from small_language_models import write, write_tokenizer
from test_as_a_new_user import write_teacher
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app


def run_with_a_student(folder: Path) -> Path:
    """A run of a random HoVLE with vision and weights large enough for varied answers."""
    write_teacher(folder)
    file = folder / "hovle.ckpt"
    rng = torch.Generator().manual_seed(1)
    state = torch.load(file)["state_dict"]
    for name, tensor in state.items():
        scale = 0.5 if tensor.dim() == 1 else 1.5 / tensor[0].numel() ** 0.5
        noise = scale * torch.randn(tensor.shape, generator=rng)
        state[name] = noise + 1 if "norm" in name else noise
    torch.save({"state_dict": state}, file)
    run = folder / "run"
    words = ["seed", str(file), "--run", str(run), "--no-report", "--dtype", "fp32"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return run


def language_model(folder: Path) -> Path:
    """A random Llama with a ChatML template."""
    write(folder, "Llama", {})
    write_tokenizer(folder)
    return folder
