"""Formulas and sizes of docs/concepts.md against the code."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from pages import ROOT

from mmmamba_cli.architecture import LINEAR, StackConfig
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.gated_mixer import DT_MAX, DT_MIN, GATED_NORM_EPS
from mmmamba_cli.model.mixers.mamba2 import Mamba2
from mmmamba_cli.model.sequence_layout import SequenceLayout
from mmmamba_cli.seed import initial_value

PAGE = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
HIDDEN, LENGTH = 24, 13
STACK = StackConfig(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=32)


@pytest.fixture
def seeded() -> Mamba2:
    config = HolisticVLMConfig(
        vocab_size=8, hidden_size=HIDDEN, layer_types=[LINEAR], language_stack=asdict(STACK)
    )
    mixer = Mamba2(config, 0).double()
    with torch.no_grad():
        for name, value in mixer.named_parameters():
            full = f"model.layers.0.mixer.{name}"
            value.copy_(initial_value(full, tuple(value.shape), "mamba2", "inherit+mimic", 0))
    return mixer


@torch.no_grad()
def test_a_seeded_mixer_is_linear_attention_that_forgets(seeded: Mamba2) -> None:
    """The equations of `mix` and of "Initialization" on the page, written out."""
    hidden = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
    heads, width = STACK.num_heads, STACK.head_dim

    def read(matrix: torch.nn.Linear, count: int) -> torch.Tensor:
        """(heads, T, P), with key and value heads repeated for their query heads."""
        return F.silu(matrix(hidden)).view(LENGTH, count, width).transpose(0, 1)

    q = read(seeded.q_proj, heads)
    k = read(seeded.k_proj, STACK.num_kv_heads).repeat_interleave(2, dim=0)
    v = read(seeded.v_proj, STACK.num_kv_heads).repeat_interleave(2, dim=0)
    delta = F.softplus(seeded.dt_bias)
    gamma = torch.exp(-math.e * delta)
    age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    decay = gamma[:, None, None] ** age.clamp(min=0) * (age >= 0)
    y = (delta[:, None, None] * decay * (q @ k.mT)) @ v
    normed = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = normed.transpose(0, 1).reshape(LENGTH, -1) * F.silu(seeded.g_proj(hidden)[0])
    empty = torch.zeros(1, LENGTH, width)
    actual = seeded.mix(hidden, SequenceLayout(cos=empty, sin=empty, past=0))[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert GATED_NORM_EPS == 1e-5
    assert "10^{-5}" in PAGE


def test_first_memories_are_as_long_as_the_page_says() -> None:
    short, long = math.exp(-math.e * DT_MAX), math.exp(-math.e * DT_MIN)
    assert f"$\\gamma$ between {short:.3f} and {long:.4f}" in " ".join(PAGE.split())
    lengths = round(1 / (math.e * DT_MAX)), round(1 / (math.e * DT_MIN), -1)
    assert f"about {lengths[0]} to {lengths[1]:.0f} tokens" in " ".join(PAGE.split())


def test_what_decoding_remembers_of_a_hovle() -> None:
    from mmmamba_cli.checkpoint.hovle import ARCHITECTURES, to_config
    from mmmamba_cli.inspection import memory_at

    teacher = to_config(ARCHITECTURES["hovle-2.6b"])
    token = memory_at("teacher", teacher, 1, "bfloat16").kv_cache
    student = to_config(ARCHITECTURES["hovle-2.6b"])
    student.layer_types = ["linear_attention"] * len(student.layer_types)
    state = memory_at("student", student, 1, "bfloat16")
    assert f"| {token / 2**10:.0f} KiB a token in bf16 |" in PAGE
    assert f"| {state.ssm_state / 2**20:.0f} MiB |" in PAGE
    assert f"| {state.conv_state / 2**20:.2f} MiB in bf16 |" in PAGE
    assert f"of {state.state / token:.0f} tokens" in " ".join(PAGE.split())
    student.mixers, student.mixer = ["window"] * len(student.layer_types), {"sinks": 16}
    window = memory_at("student", student, 1, "bfloat16")
    assert f"| {window.state / 2**20:.0f} MiB in bf16 for 16 + 256 |" in PAGE
