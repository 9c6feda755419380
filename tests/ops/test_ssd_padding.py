"""Padding and packing: rows of a batch and packed sequences equal separate runs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    REFERENCES,
    Scan,
    chunk_sizes,
    make_scan,
    masks,
    packings,
    relative_error,
    scan_oracle,
    seeds,
    sequences,
    sizes,
)
from torch import Tensor

from mmmamba_cli.ops import ssd

quick = settings(max_examples=40, deadline=None)
backends = pytest.mark.parametrize("backend", REFERENCES)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, int], Tensor | None, Tensor | None]:
    drawn = draw(sizes())
    batch, length = drawn["batch"], drawn["length"]
    mask = draw(st.none() | masks(batch, length))
    return drawn, mask, draw(st.none() | packings(batch, length))


def poison(scan: Scan, mask: Tensor | None) -> Scan:
    """The same inputs with NaN in the padding."""
    if mask is None:
        return scan
    spoilt = scan.tensors()
    for name in ("x", "dt", "B", "C"):
        spoilt[name] = spoilt[name].clone()
        spoilt[name][~mask] = torch.nan
    return Scan(**spoilt)


def loss(y: Tensor, state: Tensor) -> Tensor:
    return y.square().sum() + state.pow(3).sum()


@backends
@quick
@given(layout=layouts(), seed=seeds, chunk_size=chunk_sizes, optional=st.booleans())
def test_padded_and_packed_rows_equal_their_sequences(backend, layout, seed, chunk_size, optional):
    drawn, mask, seq_idx = layout
    scan = make_scan(seed, **drawn, optional=optional)
    y, state = ssd(
        **poison(scan, mask).tensors(),
        dt_softplus=True,
        mask=mask,
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        backend=backend,
    )
    expected_y, expected_state = scan_oracle(scan, mask, seq_idx)
    assert relative_error(y, expected_y) < 1e-10
    assert relative_error(state, expected_state) < 1e-10
    if mask is not None:
        assert (y[~mask] == 0).all()


@backends
@settings(max_examples=25, deadline=None)
@given(layout=layouts(), seed=seeds, chunk_size=chunk_sizes)
def test_gradients_equal_those_of_the_sequences_alone(backend, layout, seed, chunk_size):
    drawn, mask, seq_idx = layout
    scan = make_scan(seed, **drawn)
    together = poison(scan, mask).with_gradients()
    options = {"dt_softplus": True, "backend": backend, "chunk_size": chunk_size}
    loss(*ssd(**together.tensors(), **options, mask=mask, seq_idx=seq_idx)).backward()

    alone = scan.with_gradients()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(drawn["batch"]):
        spans = sequences(mask, seq_idx, row, drawn["length"])
        for number, columns in enumerate(spans):
            part = alone.span(row, columns)
            if number > 0:
                part.initial_state = None
            y, state = ssd(**part.tensors(), **options)
            # Only the state of the last sequence is returned.
            total = total + loss(y, state if number == len(spans) - 1 else state[:0])
    total.backward()

    for name, gradient in together.gradients().items():
        expected = alone.gradients()[name]
        if expected is None:  # no row has a real token
            expected = torch.zeros_like(gradient)
        assert relative_error(gradient, expected) < 1e-10, name


@backends
def test_integer_masks(backend):
    scan = make_scan(0)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"dt_softplus": True, "backend": backend}
    for a, b in zip(
        ssd(**scan.tensors(), **options, mask=mask),
        ssd(**scan.tensors(), **options, mask=mask.bool()),
        strict=True,
    ):
        assert torch.equal(a, b)


@backends
def test_padding_ids_start_no_sequence(backend):
    scan = make_scan(1, batch=1, length=6)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])
    options = {"dt_softplus": True, "backend": backend, "mask": mask}
    y, state = ssd(**scan.tensors(), **options, seq_idx=torch.tensor([[9, 4, 4, 9, 4, 4]]))
    expected_y, expected_state = ssd(**scan.tensors(), **options)
    assert torch.equal(y, expected_y) and torch.equal(state, expected_state)
