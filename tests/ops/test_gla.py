"""Gated linear attention beside other ops: `ssd` is the form with one decay per head.

test_recurrences.py has golden tensors and the properties that it shares with the delta rules.
"""

import pytest
import torch
from golden_related_files import assert_close_to_golden, related_cases, related_tensors
from ops_cases import relative_error
from recurrence_cases import BACKENDS_AND_CHUNKS, make_recurrence

from mmmamba_cli.ops import delta_rule, ssd


@related_cases("mixers", "simple_gla")
@BACKENDS_AND_CHUNKS
def test_golden_related_simple_gla_is_ssd(file, backend, chunk_size):
    golden = related_tensors(file)
    given = golden.inputs
    step_sizes = -given["g"]
    y, state = ssd(
        given["v"] / step_sizes.unsqueeze(-1),
        step_sizes,
        -torch.ones(step_sizes.shape[-1], dtype=torch.float64),
        given["k"],
        given["q"] * golden.scale,
        initial_state=given["state"].mT,
        chunk_size=chunk_size,
        backend=backend,
    )
    assert_close_to_golden(golden, y=y, state=state.mT)


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_scale_multiplies_the_read_out_only(backend):
    case = make_recurrence("gla", 0, length=9)
    y, state = case.run(backend=backend)
    scaled_y, scaled_state = case.run(backend=backend, scale=0.3)
    assert relative_error(scaled_y, y * 0.3 * case.q.shape[-1] ** 0.5) < 1e-12
    assert torch.equal(scaled_state, state)


def test_orthogonal_keys_make_the_delta_rule_gated_linear_attention():
    # Each token has its key, so the state holds nothing for it that would be subtracted.
    case = make_recurrence("gla", 1, batch=1, length=5, state_dim=5, optional=False)
    case.k = torch.eye(5, dtype=torch.float64).view(1, 5, 1, 5).expand_as(case.k)
    ones = torch.ones(1, 5, 4, dtype=torch.float64)
    for a, b in zip(case.run(), delta_rule(*case.tensors().values(), ones), strict=True):
        assert relative_error(a, b) < 1e-12
