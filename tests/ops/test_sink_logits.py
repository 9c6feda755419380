"""Gradients of learned sink logits where nothing else learns, as in stage 1."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mmmamba_cli.ops import window_attention

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def gradient(device: str, dtype: torch.dtype, others: bool) -> torch.Tensor:
    """Gradient of the sink logits; q, k and v learn too with `others`."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int, learns: bool) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype).requires_grad_(learns)

    q, k, v = (draw(2, heads, 200, 16, learns=others) for heads in (4, 2, 2))
    logits = draw(4, learns=True)
    y = window_attention(q, k, v, window=32, sinks=4, sink_logits=logits, backend="blocked")
    return torch.autograd.grad(y.float().square().sum(), logits)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_learn_alone(device: str, dtype: torch.dtype) -> None:
    alone, together = (gradient(device, dtype, others) for others in (False, True))
    torch.testing.assert_close(alone, together)


def test_attention_gets_an_input_with_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA the fused kernel keeps its log-sum-exp only then, which the gradient needs."""
    seen = []
    attend = functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append(q.requires_grad)
        return attend(q, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    assert gradient("cpu", torch.float32, others=False).any()
    assert seen
    assert all(seen)
