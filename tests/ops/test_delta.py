"""What only the gated delta rule and Kimi delta attention have.

test_recurrences.py has golden tensors and the properties that they share with gated linear
attention.
"""

import pytest
import torch
from golden_related_files import related_cases, related_tensors
from ops_cases import relative_error
from recurrence_cases import make_recurrence

from mmmamba_cli.ops import delta_rule, delta_rule_step


@related_cases("mixers", "gated_delta_rule", "kda")
def test_golden_related_norm_of_queries_and_keys(file):
    golden = related_tensors(file)
    given, raw = golden.inputs, golden.raw
    options = {"scale": golden.scale, "initial_state": given["state"].mT, "qk_l2_norm": True}
    gates = (given["g"], given["beta"])
    y, state = delta_rule(given["v"], raw["k"], raw["q"], *gates, **options)
    torch.testing.assert_close(y, golden.outputs["y"], rtol=0, atol=1e-5)
    torch.testing.assert_close(state.mT, golden.outputs["state"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_beta_of_one_replaces_the_value_of_a_key(backend):
    case = make_recurrence("delta", 0, length=9, groups=1)
    case.k, case.beta = case.k[:, :1].expand_as(case.k), torch.ones_like(case.beta)
    _, state = case.run(backend=backend)
    key = case.k[:, -1, :, :, None]
    assert relative_error((state @ key).squeeze(-1), case.v[:, -1]) < 1e-12


def test_beta_of_zero_writes_nothing():
    case = make_recurrence("delta", 1, length=9)
    case.beta = torch.zeros_like(case.beta)
    _, state = case.run()
    assert relative_error(
        state, case.initial_state * case.log_decay.sum(1).exp()[..., None, None]
    ) < (1e-12)


@pytest.mark.parametrize("kind", ["delta", "kda"])
def test_norm_of_queries_and_keys(kind):
    case = make_recurrence(kind, 2, length=9)
    case.q, case.k = 3 * case.q, 5 * case.k

    def normal(x):
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    found = case.run(qk_l2_norm=True)
    options = {"initial_state": case.initial_state, "scale": 0.3}
    plain = (case.v, normal(case.k), normal(case.q), case.log_decay, case.beta)
    for a, b in zip(found, delta_rule(*plain, **{**options, "scale": None}), strict=True):
        assert relative_error(a, b) < 1e-12
    scaled, _ = delta_rule(*plain, **options)
    assert relative_error(scaled, found[0] * 0.3 * case.q.shape[-1] ** 0.5) < 1e-12
    one = [t[:, 0] for t in (case.v, case.k, case.q, case.log_decay, case.beta)]
    y, _ = delta_rule_step(*one, case.initial_state, qk_l2_norm=True)
    assert relative_error(y, found[0][:, 0]) < 1e-12


def test_equal_keys_stay_precise_in_fp32():
    # (I + L)^-1 of equal keys by powers of L would cancel numbers of order 2^64.
    case = make_recurrence("delta", 3, length=128, optional=False)
    case.k = case.k[:, :1].expand_as(case.k)
    case.beta, case.log_decay = torch.ones_like(case.beta), torch.zeros_like(case.log_decay)
    low = case.to(torch.float32)
    for found, expected in zip(
        low.run(chunk_size=64, backend="chunked"), case.run(backend="recurrent"), strict=True
    ):
        assert relative_error(found, expected) < 1e-5
