"""Sampled tokens follow the probabilities, restricted by top-k, top-p and suppressed tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import prompt, small_model

from mmmamba_cli.errors import DataError
from mmmamba_cli.inference import Generator
from mmmamba_cli.inference.sampling import Sampler, Settings

DRAWS = 40_000
# Probabilities of seven tokens; an eighth is suppressed.
PROBABILITIES = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04, 0.0])
SUPPRESSED = 7


def sampled(**settings: Any) -> torch.Tensor:
    """Frequencies of the eight tokens in many draws."""
    sampler = Sampler(8, torch.device("cpu"))
    parsed = Settings(**settings)
    config = SimpleNamespace(eos_token_id=None, pad_token_id=None, suppress_tokens=[SUPPRESSED, 99])
    sampler.configure(parsed, config)
    logits = torch.cat((PROBABILITIES.log() + 3, torch.tensor([50.0])))
    buffers: Any = SimpleNamespace(
        logits=logits.expand(DRAWS, 8),
        finished=torch.zeros(DRAWS, dtype=torch.bool),
        ids=torch.zeros(DRAWS, dtype=torch.long),
    )
    sampler.sample(buffers, parsed.mode)
    return buffers.ids.bincount(minlength=8) / DRAWS


def expected(probabilities: torch.Tensor, kept: int) -> torch.Tensor:
    ordered = torch.zeros(8)
    ordered[:kept] = probabilities[:kept] / probabilities[:kept].sum()
    return ordered


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, 6),
        ({"temperature": 1.0, "top_k": 3}, 3),
        ({"temperature": 1.0, "top_k": 100}, 6),
        # The nucleus is the fewest tokens that reach top_p: 0.4, 0.65, 0.8, 0.9, 0.96.
        ({"temperature": 1.0, "top_p": 0.39}, 1),
        ({"temperature": 1.0, "top_p": 0.41}, 2),
        ({"temperature": 1.0, "top_p": 0.6}, 2),
        ({"temperature": 1.0, "top_p": 0.649}, 2),
        ({"temperature": 1.0, "top_p": 0.651}, 3),
        ({"temperature": 1.0, "top_p": 0.7}, 3),
        ({"temperature": 1.0, "top_p": 0.799}, 3),
        ({"temperature": 1.0, "top_p": 0.899}, 4),
        ({"temperature": 1.0, "top_p": 0.959}, 5),
        ({"temperature": 1.0, "top_p": 0.961}, 6),
        ({"temperature": 1.0, "top_k": 1}, 1),
        ({"temperature": 1.0, "top_k": 5}, 5),
        ({"temperature": 1.0, "top_k": 7}, 6),
        ({"temperature": 1.0, "top_p": 1e-6}, 1),
        ({"temperature": 1.0, "top_p": 1.0}, 6),
        # The first of the two remaining tokens has more than half of the probability.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, 1),
        ({"temperature": 1e-30}, 1),
        ({}, 1),
    ],
)
def test_frequencies_equal_the_probabilities(settings: dict[str, Any], kept: int) -> None:
    found = sampled(**settings, seed=4)
    # Five standard errors at a probability of 0.5.
    assert (found - expected(PROBABILITIES, kept)).abs().max() < 5 * math.sqrt(0.25 / DRAWS)
    assert (found[kept:] == 0).all()


def test_temperature_flattens_the_distribution() -> None:
    found = sampled(temperature=2.0)
    distribution = expected(PROBABILITIES.sqrt(), 6)
    assert (found - distribution).abs().max() < 5 * math.sqrt(0.25 / DRAWS)


def test_a_seed_repeats_an_answer() -> None:
    generator = Generator(small_model("amam"))
    ids, _ = prompt(0, 6)
    first = generator.generate(ids, max_new_tokens=12, temperature=1.0, seed=1)
    again = generator.generate(ids, max_new_tokens=12, temperature=1.0, seed=1)
    other = generator.generate(ids, max_new_tokens=12, temperature=1.0, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    streamed = list(generator.stream(ids, max_new_tokens=12, temperature=1.0, seed=1))
    assert streamed == first.T.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 5}, "belong to drawing"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_below_the_vocabulary_size(top_k: int) -> None:
    sampler = Sampler(3, torch.device("cpu"))
    settings = Settings(temperature=1.0, top_k=top_k)
    none = SimpleNamespace(eos_token_id=None, pad_token_id=None, suppress_tokens=None)
    sampler.configure(settings, none)
    buffers: Any = SimpleNamespace(
        logits=torch.tensor([0.3, 0.4, 0.2]).expand(4000, 3),
        finished=torch.zeros(4000, dtype=torch.bool),
        ids=torch.zeros(4000, dtype=torch.long),
    )
    sampler.sample(buffers, settings.mode)
    assert sorted(buffers.ids.unique().tolist()) == sorted([1, 0, 2][:top_k])
