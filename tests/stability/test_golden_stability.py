"""Decays, certificates, deviations and exponents against `golden_related/lyapunov`."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from golden_related_files import GOLDEN_RELATED
from safetensors.torch import load_file
from torch import Tensor

from mmmamba_cli.checkpoint import load_model
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.cache import new_cache, write_ssm_state
from mmmamba_cli.model.gated_mixer import initial_gated_value
from mmmamba_cli.model.mixers.mamba2 import Mamba2
from mmmamba_cli.stability.decay_spectrum import (
    DecayObserver,
    certified_exponents,
    error_gain,
    observed_mixers,
)
from mmmamba_cli.stability.divergence import divergence
from mmmamba_cli.stability.findings import half_life
from mmmamba_cli.stability.measurement import StabilityOptions, measure_tangents
from mmmamba_cli.stability.perturbation import follow_deviation, predicted_deviation
from mmmamba_cli.stability.tangents import tangent_growth

FOLDER = GOLDEN_RELATED / "lyapunov"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
BOTH = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@cache
def golden() -> dict[str, Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@cache
def golden_model(dtype: torch.dtype) -> HolisticVLM:
    return load_model(FOLDER, device="cpu", dtype=torch.float32, frozen=True).to(dtype)


def assert_golden(found: Tensor, name: str, dtype: torch.dtype, scale: float = 1.0) -> None:
    tolerance = TOLERANCES[dtype]
    expected = golden()[name]
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance * scale, atol=tolerance * scale
    )


@BOTH
def test_decay_spectrum(dtype: torch.dtype) -> None:
    model = golden_model(dtype)
    observer = DecayObserver(model)
    with torch.no_grad(), observed_mixers(model, observer.on_call, observer.on_read_out):
        model(golden()["input_ids"][None])
    totals = [observer.totals[layer] for layer in sorted(observer.totals)]
    assert all(one.tokens == len(golden()["input_ids"]) for one in totals)
    assert_golden(torch.stack([one.exponents for one in totals]), "exponent", dtype)
    certified = torch.stack([certified_exponents(model, layer) for layer in observer.totals])
    assert_golden(certified, "certified", dtype)
    assert_golden(torch.stack([one.error_gains for one in totals]), "error_gain", dtype)
    assert_golden(torch.stack([one.state_bounds for one in totals]), "state_bound", dtype)
    read_outs = torch.stack([torch.cat(one.read_out_rms) for one in totals], dim=1)
    assert_golden(read_outs, "read_out_rms", dtype)
    assert not any(one.is_constant.any() or one.is_accumulator.any() for one in totals)


@BOTH
def test_log_decay_of_each_token(dtype: torch.dtype) -> None:
    model, found = golden_model(dtype), {}
    with (
        torch.no_grad(),
        observed_mixers(
            model,
            lambda layer, hidden, layout, cache: found.update(
                {layer: model.model.blocks[layer].mixer.log_decay(hidden)[0]}
            ),
        ),
    ):
        model(golden()["input_ids"][None])
    decays = torch.stack([found[layer] for layer in sorted(found)], dim=1)
    assert_golden(decays, "log_decay", dtype)
    steps = torch.arange(1, len(decays) + 1)[:, None, None]
    assert_golden(decays.double().cumsum(0) / steps, "exponent_running", dtype)


@BOTH
def test_deviation_of_a_disturbed_state(dtype: torch.dtype) -> None:
    model, delta = golden_model(dtype), golden()["perturbed.delta"]
    ids = golden()["input_ids"][None]
    cache = new_cache(model.config)
    conv, state = model.model.blocks[0].mixer.empty_states(1, model.lm_head.weight)
    write_ssm_state(cache, 0, conv, state + delta.to(dtype))
    found = follow_deviation(model, ids, range(1, ids.shape[1] + 1), disturbed=cache)
    states = torch.stack([found.states[0], found.states[1]], dim=1)
    assert_golden(states, "perturbed.state_deviation", dtype)
    # The norm over the vocabulary of errors of fp32 logits.
    assert_golden(found.logits, "perturbed.logit_deviation", dtype, scale=10)
    norms = torch.stack([found.state_norms[0], found.state_norms[1]], dim=1)
    assert_golden(norms, "state_norm", dtype)
    predicted = predicted_deviation(delta, found.log_decays[0])
    torch.testing.assert_close(predicted, states[:, 0], rtol=0, atol=TOLERANCES[dtype])


def test_deviation_does_not_depend_on_the_places() -> None:
    model, ids = golden_model(torch.float64), golden()["input_ids"][None]
    embeddings = model.model.text_embedding(ids) * 1.001
    every = follow_deviation(model, ids, range(1, 161), other_embeddings=embeddings)
    some = follow_deviation(model, ids, (7, 90, 160), other_embeddings=embeddings, chunk_size=32)
    torch.testing.assert_close(some.logits, every.logits, rtol=0, atol=1e-12)
    for layer in (0, 1):
        there = every.states[layer][[6, 89, 159]]
        torch.testing.assert_close(some.states[layer], there, rtol=0, atol=1e-12)
        there = every.log_decays[layer][[6, 89, 159]]
        torch.testing.assert_close(some.log_decays[layer], there, rtol=0, atol=1e-12)


def test_divergence_of_logits() -> None:
    with torch.no_grad():
        logits = golden_model(torch.float64)(golden()["input_ids"][None]).logits[0]
    found = divergence(logits, golden()["divergence.other_logits"])
    assert_golden(found.kl, "divergence.kl", torch.float64)
    assert_golden(found.max_abs, "divergence.max_abs", torch.float64)
    assert found.same_top1.equal(golden()["divergence.top1_equal"])


def test_exponents_by_tangents() -> None:
    """The basis of the tangents is another one, so finite-time exponents agree loosely."""
    ids = golden()["input_ids"][None]
    expected, predicted = golden()["spectrum_qr"], golden()["spectrum_predicted"]
    found = tangent_growth(golden_model(torch.float64), ids, len(expected)).exponents()
    alive = len(predicted)
    assert (found[:alive] - expected[:alive]).abs().max() < 0.01
    assert (found[:alive] - predicted).abs().max() < 0.03
    # The convolutions forget within a token.
    assert found[alive:].max() < -10


def test_record_of_tangents() -> None:
    """Halves are those of the text, beside the largest exponents of heads over the same tokens."""
    model, ids = golden_model(torch.float64), golden()["input_ids"][None, :20]
    found = measure_tangents(model, ids, StabilityOptions(tangents=2, seed=3))
    growth = tangent_growth(model, ids, 2, seed=3)
    assert found.halves == (float(growth.exponents(0, 10)[0]), float(growth.exponents(10)[0]))
    decays = golden()["log_decay"][:20]
    expected = [float(part.mean(0).max()) for part in (decays[:10], decays[10:])]
    assert found.head_exponents == pytest.approx(expected, abs=1e-10)
    assert found.largest_growth == growth.largest_growth >= 1
    assert (found.vectors, found.tokens) == (2, 20)


def test_start_of_a_seeded_student() -> None:
    """`init: inherit+mimic` has decays in closed form."""
    expected = {
        name.removeprefix("seeded."): value
        for name, value in golden().items()
        if name.startswith("seeded.")
    }
    heads = len(expected["dt_bias"])
    zeros = initial_gated_value("dt_proj.weight", (heads, 4), True, torch.Generator())
    log_a = Mamba2.initial_value("A_log", (heads,), True, torch.Generator())
    mixer = _mixer_of(zeros, log_a, expected["dt_bias"])
    hidden = torch.randn(1, 5, 4, dtype=torch.float64)
    decays = mixer.log_decay(hidden)[0, 0]
    torch.testing.assert_close(decays, expected["exponent"], rtol=0, atol=1e-10)
    torch.testing.assert_close(decays.exp(), expected["decay"], rtol=0, atol=1e-10)
    torch.testing.assert_close(error_gain(decays), expected["error_gain"], rtol=1e-10, atol=0)
    lives = torch.tensor([half_life(float(value)) for value in decays], dtype=torch.float64)
    torch.testing.assert_close(lives, expected["half_life"], rtol=1e-10, atol=0)
    # Without an input there is nothing between the decay and its bound.
    bound = mixer.max_log_decay(torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(bound, decays, rtol=0, atol=1e-12)


def _mixer_of(dt_proj: Tensor, log_a: Tensor, dt_bias: Tensor) -> Mamba2:
    """A mixer that has what decays need, in fp64."""
    mixer = Mamba2.__new__(Mamba2)
    torch.nn.Module.__init__(mixer)
    mixer.input_step = True
    mixer.dt_proj = torch.nn.Linear(dt_proj.shape[1], dt_proj.shape[0], bias=False)
    mixer.dt_proj.weight = torch.nn.Parameter(dt_proj.double())
    mixer.A_log = torch.nn.Parameter(log_a.double())
    mixer.dt_bias = torch.nn.Parameter(dt_bias)
    return mixer.requires_grad_(False)
