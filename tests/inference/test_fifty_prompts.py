"""`Generator` gives the tokens of `generate` on fifty prompts, for mixers with fast decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small_model
from test_window_decoding import OPTIONS, batch

from mmmamba_cli.inference import Generator

MODELS: dict[str, dict[str, Any]] = {
    "wwaw": OPTIONS["first columns"],
    "ddad": {},
    "mmam": {},
}


@pytest.mark.parametrize("plan", MODELS)
def test_fifty_prompts_give_the_tokens_of_the_model(plan: str) -> None:
    model = small_model(plan, "post", **MODELS[plan])
    generator = Generator(model)
    for seed in range(0, 50, 10):
        rows = [(i % 3, 3 + (seed + 7 * i) % 23) for i in range(10)]
        ids, inputs = batch(seed, *rows)
        found = generator.generate(ids, **inputs, max_new_tokens=12, eos=())
        expected = model.generate(
            ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **inputs
        )
        assert torch.equal(found, expected[:, ids.shape[1] :])
