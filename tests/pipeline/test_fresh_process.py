"""Products load through transformers' Auto classes in a process that only imports mmmamba."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ended import Command
from isolated_process import ROOT, run_isolated
from safetensors.torch import load_file

import mmmamba_cli

PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from safetensors.torch import load_file, save_file
import mmmamba_cli.model
folder, golden, out = sys.argv[1:]
inputs = load_file(golden)
found = {}
for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        logits = model(inputs["input.input_ids"], inputs["input.pixel_values"]).logits
    found[auto.__name__] = logits
    assert model.model.layers[0].mixer.A_log.dtype == torch.float32
save_file(found, out)
"""


def test_auto_classes_give_the_same_logits(
    mmmamba: Command, hovle_folder: Path, tmp_path: Path
) -> None:
    golden = Path(__file__).parents[1] / "golden/hovle_post/golden.safetensors"
    run = tmp_path / "run"
    assert mmmamba("seed", hovle_folder, "--no-report", "--run", run).code == 0
    product, out = run / "products/seed", tmp_path / "logits.safetensors"
    run_isolated(PROGRAM, product, golden, out, package=ROOT)
    inputs, model = load_file(golden), mmmamba_cli.load(str(product))
    with torch.no_grad():
        expected = model(inputs["input.input_ids"], inputs["input.pixel_values"]).logits
    for logits in load_file(out).values():
        assert torch.equal(logits, expected)
    assert json.loads((product / "config.json").read_text())["dtype"] == "bfloat16"
