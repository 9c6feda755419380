"""Kills while layers of several mixers are trained, resumed to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

from test_distill import distill, done
from test_overwrite import killed, metrics

from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.runs import Run

# While a state of stage 1 is written, and after one of stage 3.
PLACES = [
    ["open", "/training/stage1/.step-00000004", 1],
    ["open", "/products/.hybrid-1-stage3.partial", 3],
]
FINAL = "hybrid-1-stage3"


def test_kills_in_stages_1_and_3_give_the_same_bits(seeded: Path, tmp_path: Path) -> None:
    words = ("seed", seeded / "hovle.ckpt", "--run", tmp_path / "run", "--recipe", "smoke")
    options = ("mixer.kind=gated_delta", "layers.mixers={window: [1, 2], kda: [3], gla: [4]}")
    done(*words, "--no-report", *(word for one in options for word in ("--set", one)))
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "run", whole / "run")
    done(*distill(whole, seeded))
    starts = killed(tmp_path, distill(tmp_path, seeded), PLACES)
    assert ["killed" in start for start in starts] == [True, True, False]
    one, two = Run(tmp_path / "run"), Run(whole / "run")
    mixers = set(open_checkpoint(one.product_folder(FINAL)).config.mixer_names)
    assert mixers == {"attention", "gated_delta", "window", "kda", "gla"}
    assert one.products().keys() == two.products().keys()
    for name, product in one.products().items():
        assert product.content_hash == two.product(name).content_hash, name
    assert metrics(tmp_path, FINAL) == metrics(whole, FINAL)
