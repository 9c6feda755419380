"""`mmmamba distill` and `mmmamba data check` on a corpus that is drawn while training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from test_distill import distill, done, killed_at, refused, same, weights

from mmmamba_cli.plugins import load_reference

# Makes `mmmamba_evals` importable in a checkout.
load_reference("mmmamba_evals:suite_folder")

LESSONS = "scenes:lessons?long=0.5&tiles=0&pictures=2-2&sentences=1-2"
DRAWN = ("--data", LESSONS, "--set", "data.image_root=null", "--set", "data.max_length=2000")
# A learning rate that does not depend on the number of steps: the killed stage is longer.
CONSTANT = ("--set", "stages.stage1.schedule={kind: constant, warmup: 0}")
ONE = ("--stage", "1", *DRAWN, *CONSTANT)


def last_row(work: Path, product: str) -> dict[str, object]:
    text = (work / f"run/products/{product}/metrics.jsonl").read_text()
    row: dict[str, object] = json.loads(text.splitlines()[-1])
    return row


def test_a_killed_training_resumes_with_the_same_bits(work: Path, seeded: Path) -> None:
    whole = work.parent / "whole"
    shutil.copytree(work, whole)
    done(*distill(whole, seeded, *ONE, "--set", "data.workers=2"))
    killed_at(work, seeded, "stage1", 2, *ONE)
    other = LESSONS.replace("pictures=2-2", "pictures=2-3")
    message = refused(*distill(work, seeded, *ONE, "--data", other))
    assert f"conversations of data.train ({other}) have changed" in message
    done(*distill(work, seeded, *ONE))
    assert same(weights(work, "stage1"), weights(whole, "stage1"))
    assert last_row(work, "stage1")["loss"] == last_row(whole, "stage1")["loss"]


def test_a_stage_with_its_own_data(work: Path, seeded: Path) -> None:
    """Every stage reads a stream of its own; held-out samples are the same for all."""
    held_out = ("--held-out", "scenes:lessons?long=0&alter=0&samples=2")
    own = ("--set", "stages.stage2.train=scenes:lessons?long=0")
    done(*distill(work, seeded, "--stage", "1,2", *DRAWN, *own, *held_out))
    before, after = last_row(work, "stage1"), last_row(work, "stage2")
    assert before["held_out/samples"] == after["held_out/samples"] == 2
    assert before["held_out/tokens"] == after["held_out/tokens"]
    manifest = json.loads((work / "run/products/stage2/manifest.json").read_text())
    first = json.loads((work / "run/products/stage1/manifest.json").read_text())
    assert manifest["data"]["train"] != first["data"]["train"]
    assert manifest["data"]["held_out"] == first["data"]["held_out"]
    assert torch.isfinite(next(iter(weights(work, "stage2").values()))).all()


def test_checks_and_refusals(work: Path, seeded: Path) -> None:
    found = done("data", "check", LESSONS, "--run", work / "run", "--limit", "6", "--json")
    report = json.loads(found.stdout)
    assert (report["samples"], report["bad"]) == (6, 0)
    assert report["images"] > 0
    message = refused(*distill(work, seeded, *ONE, "--data", "scenes:lessons?hue=1"))
    assert "scenes:lessons has no option 'hue'" in message
