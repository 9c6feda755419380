"""Low-rank adapters in the last stage of `mmmamba distill`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conversations import write_conversations
from families import FAMILIES, save_teacher
from test_distill import distill, done, refused, weights

LORA = ("--set", "stages.stage3.lora={rank: 4, alpha: 400.0}")


def test_adapters_are_merged(work: Path, seeded: Path) -> None:
    result = done(*distill(work, seeded, *LORA))
    assert "mixer.q_proj.lora_A.default.weight" in result.output
    assert "mixer.q_proj.base_layer" not in result.output
    before, after = weights(work, "hybrid-1"), weights(work, "hybrid-1-stage3")
    assert before.keys() == after.keys()
    name = "model.layers.3.mixer.q_proj.weight"
    change = (after[name] - before[name]).float()
    assert change.abs().max() > 0
    # Up to bf16 rounding, the change has the rank of the adapter.
    values = torch.linalg.svdvals(change)
    assert values[4] < 0.2 * values[0]
    assert torch.equal(before[name.replace("q_", "o_")], after[name.replace("q_", "o_")])
    assert not torch.equal(before[name.replace("q_", "g_")], after[name.replace("q_", "g_")])


def test_adapters_need_peft_and_a_matrix(
    work: Path, seeded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(*distill(work, seeded, "--stage", "1,2"))
    wrong = ("--set", "stages.stage3.lora={targets: [gate]}")
    said = refused(*distill(work, seeded, *wrong))
    assert "stages.stage3.lora.targets[0]: is 'gate'" in said
    assert "matrices are dt_proj, g_proj, k_proj, o_proj, q_proj, v_proj" in said
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'mmmamba[lora]'" in refused(*distill(work, seeded, *LORA))


def test_merging_does_not_round_the_weight(seeded: Path, tmp_path: Path) -> None:
    """The frozen matrix in memory is bf16, but the product adds to the parent's fp32 weight."""
    done(
        "seed", seeded / "hovle.ckpt", "--run", tmp_path / "run", "--recipe", "smoke",
        "--no-report", "--dtype", "fp32",
    )  # fmt: skip
    short = [word for n in (1, 2, 3) for word in ("--set", f"stages.stage{n}.steps=2")]
    bf16 = ("--set", "stages.stage3.precision=bf16", *LORA)
    done(*distill(tmp_path, seeded, *short, *bf16))
    before, after = weights(tmp_path, "hybrid-1"), weights(tmp_path, "hybrid-1-stage3")
    name = "model.layers.3.mixer.q_proj.weight"
    assert after[name].dtype == torch.float32
    values = torch.linalg.svdvals((after[name] - before[name]).double())
    # Rank 4 up to fp32 rounding; bf16 rounding would leave 2e-3 of each weight.
    assert values[0] > 0
    assert values[4] < 1e-6 * before[name].norm()


def test_biases_of_adapted_matrices_learn(tmp_path: Path) -> None:
    save_teacher(FAMILIES["qwen2"], tmp_path / "teacher")
    write_conversations(tmp_path, 8, pictures=False)
    short = [word for n in (1, 2, 3) for word in ("--set", f"stages.stage{n}.steps=2")]
    seed = ("seed", tmp_path / "teacher", "--run", tmp_path / "run", "--recipe", "smoke")
    done(*seed, "--no-report", "--dtype", "fp32")
    assert "base_layer" not in done(*distill(tmp_path, tmp_path, *short, *LORA)).output
    before, after = weights(tmp_path, "hybrid-1"), weights(tmp_path, "hybrid-1-stage3")
    assert before.keys() == after.keys()
    for name in ("q_proj.weight", "q_proj.bias"):
        name = f"model.layers.1.mixer.{name}"
        assert not torch.equal(before[name], after[name])
