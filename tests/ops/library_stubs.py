"""Stand-ins for the ops of mamba_ssm and fla: the same signatures, computed token by token.

Written from the documentation of the libraries. In mamba_ssm the heads of a group share B and C,
and the initial state belongs to sequence 0; in fla the state is (N, P) and `scale` has a default.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmmamba_cli.ops import dispatch, recurrence_dispatch, recurrence_fla
from mmmamba_cli.ops.backends import optional_backend
from mmmamba_cli.ops.delta import DELTA_BACKENDS
from mmmamba_cli.ops.gla import GLA_BACKENDS
from mmmamba_cli.ops.ssd import SCAN_BACKENDS
from mmmamba_cli.ops.ssd import __name__ as PACKAGE
from mmmamba_cli.ops.ssd.dispatch import LIMITS

MAMBA_INIT = "import selective_scan_cuda_of_a_stand_in\n"
FILES = {
    "mamba_ssm/__init__.py": "",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/ssd_combined.py": "from library_stubs import mamba_chunk_scan_combined\n",
    "fla/__init__.py": "",
    "fla/ops/__init__.py": "",
    "fla/ops/simple_gla/__init__.py": "from library_stubs import chunk_simple_gla\n",
    "fla/ops/gla/__init__.py": "from library_stubs import chunk_gla\n",
    "fla/ops/gated_delta_rule/__init__.py": "from library_stubs import chunk_gated_delta_rule\n",
    "fla/ops/kda/__init__.py": "from library_stubs import chunk_kda\n",
}


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """x (B, T, H, P), dt (B, T, H), B and C (B, T, groups, N) -> y, and states (B, H, P, N)."""
    assert z is None and cu_seqlens is None and not return_varlen_states
    batch, length, heads, dim = x.shape
    groups, state_dim = B.shape[2:]
    assert B.shape == C.shape == (batch, length, groups, state_dim) and heads % groups == 0
    assert chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    steps = (F.softplus(steps) if dt_softplus else steps).clamp(*dt_limit)
    keys, queries = (t.repeat_interleave(heads // groups, 2).to(wide) for t in (B, C))
    state = x.new_zeros(batch, heads, dim, state_dim, dtype=wide)
    if initial_states is not None:
        assert initial_states.shape == state.shape
        state = initial_states.to(wide)
    before = torch.zeros(batch, dtype=torch.int32)
    outputs = []
    for t in range(length):
        decay = (steps[:, t] * A.to(wide)).exp()
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            decay = decay * (seq_idx[:, t] == before).unsqueeze(-1)
            before = seq_idx[:, t]
        given = steps[:, t, :, None] * x[:, t].to(wide)
        state = decay[..., None, None] * state + given[..., None] * keys[:, t, :, None]
        y = (state @ queries[:, t, :, :, None]).squeeze(-1)
        outputs.append(y if D is None else y + D.to(wide)[:, None] * x[:, t].to(wide))
    y = torch.stack(outputs, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def chunk_simple_gla(
    q, k, v, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """q and k (B, T, H, N), v (B, T, H, P), g (B, T, H) -> y and a state (B, H, N, P)."""
    assert cu_seqlens is None
    batch, length, heads, state_dim = q.shape
    assert k.shape == q.shape and g.shape == q.shape[:3] and v.shape[:3] == q.shape[:3]
    assert q.dtype == k.dtype == v.dtype
    wide = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(batch, heads, state_dim, v.shape[-1], dtype=wide)
    if initial_state is not None:
        assert initial_state.shape == state.shape and initial_state.is_contiguous()
        state = initial_state.to(wide)
    outputs = []
    for t in range(length):
        given = k[:, t, :, :, None].to(wide) * v[:, t, :, None].to(wide)
        state = g[:, t].to(wide).exp()[..., None, None] * state + given
        y = (q[:, t, :, None].to(wide) @ state).squeeze(-2)
        outputs.append(y * (state_dim**-0.5 if scale is None else scale))
    return torch.stack(outputs, 1).to(q.dtype), state if output_final_state else None


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    """q, k and g (B, T, H, N), v (B, T, H, P) -> y and a state (B, H, N, P)."""
    assert g.shape == q.shape
    return _recurrence(q, k, v, g, None, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False
):
    """The same with g and beta (B, T, H)."""
    assert g.shape == beta.shape == q.shape[:3]
    return _recurrence(q, k, v, g.unsqueeze(-1), beta, scale, initial_state, output_final_state)


def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """The same with g (B, T, H, N) and beta (B, T, H)."""
    assert g.shape == q.shape and beta.shape == q.shape[:3]
    return _recurrence(q, k, v, g, beta, scale, initial_state, output_final_state)


def _recurrence(q, k, v, g, beta, scale, initial_state, output_final_state):
    batch, length, heads, state_dim = q.shape
    assert k.shape == q.shape and v.shape[:3] == q.shape[:3]
    assert q.dtype == k.dtype == v.dtype
    wide = torch.promote_types(q.dtype, torch.float32)
    assert g.dtype == wide and (beta is None or beta.dtype == wide)
    state = q.new_zeros(batch, heads, state_dim, v.shape[-1], dtype=wide)
    if initial_state is not None:
        assert initial_state.shape == state.shape and initial_state.is_contiguous()
        assert initial_state.dtype == wide
        state = initial_state
    outputs = []
    for t in range(length):
        key, value = k[:, t, :, :, None].to(wide), v[:, t, :, None].to(wide)
        state = g[:, t, :, :, None].exp() * state
        if beta is not None:
            value = beta[:, t, :, None, None] * (value - key.mT @ state)
        state = state + key * value
        y = (q[:, t, :, None].to(wide) @ state).squeeze(-2)
        outputs.append(y * (state_dim**-0.5 if scale is None else scale))
    return torch.stack(outputs, 1).to(q.dtype), state if output_final_state else None


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Write both libraries as packages into `folder` and register their backends."""
    for name, text in (FILES | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    for name in ("mamba_ssm", "fla"):
        (found,) = optional_backend(name, f"{PACKAGE}.{name}", "scan", name).items()
        monkeypatch.setitem(SCAN_BACKENDS, *found)
    (found,) = optional_backend("fla", recurrence_fla.__name__, "scan", "fla").items()
    for backends in (DELTA_BACKENDS, GLA_BACKENDS):
        monkeypatch.setitem(backends, *found)


@contextmanager
def none_imported() -> Iterator[None]:
    """As in a new process: no library imported, no self-test run; restored at exit."""
    adapters = [importlib.import_module(f"{PACKAGE}.{name}") for name in ("mamba_ssm", "fla")]
    adapters.append(recurrence_fla)

    def forget() -> dict[str, object]:
        for adapter in adapters:
            adapter.library_kernels.cache_clear()
        names = [n for n in sys.modules if n.partition(".")[0] in ("mamba_ssm", "fla")]
        return {name: sys.modules.pop(name) for name in names}

    before, tried = forget(), dict(dispatch._results)
    dispatch._results.clear()
    try:
        yield
    finally:
        forget()
        sys.modules.update(before)
        dispatch._results.clear()
        dispatch._results.update(tried)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *more: torch.dtype) -> None:
    """Treat the CPU as a GPU, and `more` dtypes as supported by the libraries."""
    monkeypatch.setattr(dispatch, "supports_triton", lambda *tensors: True)
    for limits in (LIMITS, recurrence_dispatch.LIMITS):
        for name, its in limits.items():
            allowed = its._replace(dtypes=(*its.dtypes, *more), dim_multiple=1)
            monkeypatch.setitem(limits, name, allowed)
