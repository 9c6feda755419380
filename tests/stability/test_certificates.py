"""Properties of decays: no prompt decays less than certified, no state exceeds its bound."""

from __future__ import annotations

import pytest
import torch
from small import IMAGE_ID, MIXERS, small_model
from torch import Tensor

from mmmamba_cli.architecture import EXACT_DECAY, mixer_spec, mixer_specs
from mmmamba_cli.model.cache import new_cache, read_ssm_state
from mmmamba_cli.stability.decay_spectrum import (
    DecayObserver,
    certified_exponents,
    observed_mixers,
)
from mmmamba_cli.stability.model_layers import decaying_layers, layer_specs
from mmmamba_cli.stability.perturbation import (
    disturbed_states,
    follow_deviation,
    log_places,
    predicted_deviation,
)

LETTERS = {name: letter for letter, name in MIXERS.items()}
DECAYING = [name for name, spec in mixer_specs().items() if spec.decay is not None]
CASES = [*((name, {}) for name in DECAYING), ("mamba2", {"input_step": False})]
PROMPTS, LENGTH = 200, 12


def model_of(name: str, **options: object):  # type: ignore[no-untyped-def]
    """Four layers of one mixer in fp64, whose decays are spread over several magnitudes."""
    return small_model(LETTERS[name] * 4, **options).double()


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, IMAGE_ID, (rows, length), generator=generator)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_token_decays_less_than_certified(name: str, options: dict[str, object]) -> None:
    model = model_of(name, **options)
    largest: dict[int, Tensor] = {}

    def on_call(layer: int, hidden: Tensor, *rest: object) -> None:
        largest[layer] = decaying_layers(model)[layer].log_decay(hidden).amax((0, 1))

    with torch.no_grad(), observed_mixers(model, on_call):
        model(random_ids(PROMPTS, LENGTH), use_cache=False)
    assert sorted(largest) == [0, 1, 2, 3]
    for layer, found in largest.items():
        certified = certified_exponents(model, layer)
        assert certified.shape == found.shape
        assert (certified < 0).all()
        assert (found <= certified).all()


@pytest.mark.parametrize("name", DECAYING)
def test_the_certificate_is_reached_by_an_input(name: str) -> None:
    """The input that moves the slowest channel the most has the decay of the certificate."""
    model = model_of(name)
    mixer, gain = model.model.blocks[0].mixer, model.model.blocks[0].mixer_norm.weight
    certified = certified_exponents(model, 0)
    probe = torch.zeros(1, 1, len(gain), dtype=torch.float64, requires_grad=True)
    place = tuple(0 for _ in certified.shape)
    # log gamma depends on one projection alone, so its gradient has the direction of its row.
    (row,) = torch.autograd.grad(mixer.log_decay(probe)[(0, 0, *place)], probe)
    direction = row * gain
    unit = direction / direction.norm() * len(gain) ** 0.5
    reached = mixer.log_decay(gain * unit)[(0, 0, *place)]
    torch.testing.assert_close(reached, certified[place], rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_states_stay_within_their_bounds(name: str, options: dict[str, object]) -> None:
    model, ids = model_of(name, **options), random_ids(1, 24)
    observer = DecayObserver(model)
    cache = new_cache(model.config)
    with torch.no_grad(), observed_mixers(model, observer.on_call):
        for token in range(ids.shape[1]):
            model(ids[:, token : token + 1], cache=cache)
            for layer, totals in observer.totals.items():
                _, state = read_ssm_state(cache, layer)
                norms = torch.linalg.matrix_norm(state[0])
                assert (norms <= totals.state_bounds * (1 + 1e-12)).all()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_deviation_of_the_first_layer_is_predicted(name: str, options: dict[str, object]) -> None:
    """Exactly for a pure decay, from above for a delta rule."""
    model, ids = model_of(name, **options), random_ids(1, 40)
    cache = new_cache(model.config)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        disturbed, deltas = disturbed_states(model, cache, 1e-3, seed=0)
    _, state = read_ssm_state(cache, 0)
    share = torch.linalg.matrix_norm(deltas[0]) / torch.linalg.matrix_norm(state[0])
    torch.testing.assert_close(share, torch.full_like(share, 1e-3))
    found = follow_deviation(
        model, ids[:, 8:], log_places(32), reference=cache, disturbed=disturbed
    )
    predicted = predicted_deviation(deltas[0], found.log_decays[0])
    if mixer_spec(name).decay == EXACT_DECAY:
        torch.testing.assert_close(found.states[0], predicted, rtol=1e-6, atol=1e-14)
    else:
        assert (found.states[0] <= predicted * (1 + 1e-9) + 1e-12).all()
        assert (found.states[0][-1] < 0.99 * predicted[-1]).any()


def test_layers_without_a_decay_are_told_apart() -> None:
    model = small_model("mwam")
    assert sorted(decaying_layers(model)) == [0, 3]
    assert [spec.decay is None for spec in layer_specs(model)] == [False, True, True, False]


def test_marks_of_heads() -> None:
    """A head that rounds to 1, one whose decay ignores the input, and one that does neither."""
    model = model_of("mamba2")
    mixer = model.model.blocks[0].mixer
    mixer.dt_proj.weight[:2] = 0
    mixer.dt_bias[0] = -40.0
    observer = DecayObserver(model)
    ids, cache = random_ids(1, 16), new_cache(model.config)
    with torch.no_grad(), observed_mixers(model, observer.on_call):
        model(ids[:, :5], cache=cache)
        model(ids[:, 5:], cache=cache)
    totals = observer.totals[0]
    assert totals.tokens == 16
    assert totals.is_constant.tolist() == [True, True, False, False]
    assert totals.is_accumulator.tolist() == [True, False, False, False]
