"""Sliding-window attention: golden tensors, an oracle, padding, packing, states and steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from golden_related_files import assert_close_to_golden, related_cases, related_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import masks, packings, sequences
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import attention, window_attention, window_matrix, window_step
from mmmamba_cli.ops.window import window_state

B, H, K, P = 3, 4, 2, 4
INF = math.inf
BACKENDS = ("blocked", "reference")


def normal(seed: int):
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)


def tokens(length: int, seed: int = 0, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    draw = normal(seed)
    q, k, v = (draw(batch, heads, length, P) for heads in (H, K, K))
    return q, k, v


def past(state) -> dict[str, Tensor]:
    return {f"past_{name}": value for name, value in state._asdict().items()}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def oracle(q, k, v, *, window, sinks=0, sink_logits=None, mask=None, seq_idx=None) -> Tensor:
    """y (B, H, T, P), by a loop over the tokens of each sequence."""
    y = torch.zeros_like(q)
    for row in range(len(q)):
        for columns in sequences(mask, seq_idx, row, q.shape[2]):
            for i, h in itertools.product(range(len(columns)), range(q.shape[1])):
                seen = columns[[j for j in range(i + 1) if i - j < window or j < sinks]]
                head = h // (q.shape[1] // k.shape[1])
                scores = (k[row, head, seen] @ q[row, h, columns[i]] / math.sqrt(q.shape[3])).exp()
                rest = 0 if sink_logits is None else sink_logits[h].exp()
                y[row, h, columns[i]] = scores @ v[row, head, seen] / (scores.sum() + rest)
    return y


@related_cases("mixers", "window")
@pytest.mark.parametrize(
    ("backend", "block_size"), [("reference", None), ("blocked", None), ("blocked", 4)]
)
def test_golden_related_windows(file, backend, block_size):
    golden = related_tensors(file)
    q, k, v = (golden.inputs[name].transpose(1, 2) for name in "qkv")
    assert golden.scale == pytest.approx(q.shape[-1] ** -0.5)
    y = window_attention(
        q,
        k,
        v,
        window=int(golden.metadata["window"]),
        sinks=int(golden.metadata.get("first", 0)),
        sink_logits=golden.inputs.get("sink_bias"),
        block_size=block_size,
        backend=backend,
    )
    assert_close_to_golden(golden, y=y.transpose(1, 2))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_both_backends_equal_a_loop_over_tokens(data):
    length = data.draw(st.integers(1, 16), "length")
    options: dict[str, Any] = {
        "window": data.draw(st.sampled_from([1, 2, 5, 20]), "window"),
        "sinks": data.draw(st.sampled_from([0, 1, 3, 20]), "sinks"),
        "sink_logits": data.draw(st.sampled_from([None, normal(1)(H)]), "sink_logits"),
        "mask": data.draw(st.none() | masks(B, length), "mask"),
        "seq_idx": data.draw(st.none() | packings(B, length), "seq_idx"),
    }
    q, k, v = tokens(length)
    wanted = oracle(q, k, v, **options)
    close(window_attention(q, k, v, **options, backend="reference"), wanted)
    block_size = data.draw(st.sampled_from([1, 4, None]), "block_size")
    close(window_attention(q, k, v, **options, block_size=block_size), wanted)


@pytest.mark.parametrize("before", [0, 2, 9, 30])
@pytest.mark.parametrize("sinks", [0, 3, 50])
@pytest.mark.parametrize("window", [1, 7, 50])
def test_blocked_equals_the_reference_with_a_past(window, sinks, before):
    draw = normal(before)
    mask = torch.ones(B, before, dtype=torch.bool)
    mask[0, : before // 2] = False
    sizes = {"window": window, "sinks": sinks}
    state = window_state(*tokens(before, 1)[1:], **sizes, mask=mask)
    for length, block_size, packed in ((1, None, False), (13, 4, True), (21, 8, False)):
        seq_idx = (torch.arange(length) // 5).expand(B, -1) if packed else None
        options = {**sizes, **past(state), "seq_idx": seq_idx, "sink_logits": draw(H)}
        leaves = [x.requires_grad_() for x in tokens(length)]
        state.keys.requires_grad_(), state.values.requires_grad_()
        dy, found = draw(B, H, length, P), []
        for backend in BACKENDS:
            y = window_attention(*leaves, **options, block_size=block_size, backend=backend)
            wrt = [*leaves, state.keys, state.values]
            found.append([y, *torch.autograd.grad(y, wrt, dy)])
        for ours, wanted in zip(*found, strict=True):
            close(ours, wanted)


@pytest.mark.parametrize("sinks", [0, 3, 40])
@pytest.mark.parametrize("window", [1, 7, 40])
@pytest.mark.parametrize("splits", [(7,), (1, 8), (5, 6, 20)])
def test_parts_and_steps_equal_one_pass(window, sinks, splits):
    length = 24
    q, k, v = tokens(length)
    # Padding in the prompt only: at the left, between tokens, at the right.
    mask = torch.ones(B, length, dtype=torch.bool)
    mask[0, :3], mask[1, 4:6], mask[2, splits[-1] - 1] = False, False, False
    sizes, sink_logits = {"window": window, "sinks": sinks}, normal(5)(H)
    wanted = window_attention(q, k, v, **sizes, sink_logits=sink_logits, mask=mask)
    found, before = [], {}
    for begin, end in itertools.pairwise((0, *splits)):
        part = [x[:, :, begin:end] for x in (q, k, v)]
        options = {**sizes, **before, "mask": mask[:, begin:end]}
        found.append(window_attention(*part, **options, sink_logits=sink_logits, block_size=4))
        before = past(window_state(*part[1:], **options))
    keys, values, counts = before.values()
    for t in range(splits[-1], length):
        one = (x[:, :, t] for x in (q, k, v))
        y = window_step(*one, keys, values, counts, sinks=sinks, sink_logits=sink_logits)
        found.append(y.view(B, H, 1, P))
        counts = counts + 1
    close(torch.cat(found, dim=2), wanted)
    whole = window_state(k, v, **sizes, mask=mask)
    for now, then in zip((keys, values, counts), whole, strict=True):
        assert torch.equal(now, then)


def test_state_has_the_first_and_the_newest_tokens():
    window, sinks = 5, 3
    for count in range(14):
        _, k, v = tokens(count, count)
        keys, values, counts = window_state(k, v, window=window, sinks=sinks)
        assert counts.tolist() == [count] * B
        for slot in range(sinks + window):
            near = [o for o in range(count) if o % window == slot - sinks]
            known = [slot] * (slot < count) if slot < sinks else near[-1:]
            for stored, x in ((keys, k), (values, v)):
                wanted = x[:, :, known[0]] if known else torch.zeros(B, K, P)
                assert torch.equal(stored[:, :, slot], wanted.to(x.dtype))
        if count <= window:
            # A window wider than the text: attention over these slots equals full attention.
            assert torch.equal(keys[:, :, sinks : sinks + count], k)
            assert torch.equal(values[:, :, sinks : sinks + count], v)


def test_state_keeps_the_dtype_of_the_past():
    _, k, v = tokens(6)
    state = window_state(k.bfloat16(), v.bfloat16(), window=4)
    later = window_state(k, v, window=4, **past(state))
    assert (later.keys.dtype, later.values.dtype) == (torch.bfloat16,) * 2
    assert later.counts.tolist() == [12] * B


def test_window_wider_than_the_text_equals_full_attention():
    q, k, v = tokens(19)
    for backend in BACKENDS:
        close(
            window_attention(q, k, v, window=19, backend=backend),
            attention(q, k, v, is_causal=True),
        )
    narrower = window_attention(q, k, v, window=18) - attention(q, k, v, is_causal=True)
    assert narrower[:, :, :18].abs().max() < 1e-10 < narrower[:, :, 18].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_batch_equal_rows_alone(backend):
    lengths, width = (3, 11, 14), 14
    options: dict[str, Any] = {"window": 4, "sinks": 2, "sink_logits": normal(3)(H)}
    options.update(block_size=5, backend=backend)
    alone = [tokens(n, n, batch=1) for n in lengths]
    wanted = [window_attention(*one, **options) for one in alone]
    for left in (True, False):
        spans = [slice(width - n, width) if left else slice(0, n) for n in lengths]
        # NaN at padding is harmless, also to gradients.
        q, k, v = (
            torch.full((B, heads, width, P), math.nan, dtype=torch.float64) for heads in (H, K, K)
        )
        mask = torch.zeros(B, width, dtype=torch.long)
        for row, span in enumerate(spans):
            mask[row, span] = 1
            for x, one in zip((q, k, v), alone[row], strict=True):
                x[row, :, span] = one[0]
        leaves = [x.requires_grad_() for x in (q, k, v)]
        y = window_attention(*leaves, **options, mask=mask)
        for row, span in enumerate(spans):
            close(y[row, :, span], wanted[row][0])
        padding = mask[:, None, :, None] == 0
        assert torch.equal(y.masked_select(padding), torch.zeros_like(y.masked_select(padding)))
        for gradient in torch.autograd.grad(y.sum(), leaves):
            assert not gradient.masked_select(padding).any()
            assert gradient.isfinite().all()
    packed = [torch.cat(parts, dim=2) for parts in zip(*alone, strict=True)]
    seq_idx = torch.repeat_interleave(torch.tensor([7, 5, 7]), torch.tensor(lengths))[None]
    close(window_attention(*packed, **options, seq_idx=seq_idx), torch.cat(wanted, dim=2))


@pytest.mark.parametrize("sink_logits", [None, normal(3)(H)])
def test_matrix_times_values_is_the_output(sink_logits):
    q, k, v = tokens(17)
    mask = torch.ones(B, 17, dtype=torch.bool)
    mask[0, :4], mask[1, 12:] = False, False
    seq_idx = (torch.arange(17) // 6).expand(B, -1)
    options = {"window": 3, "sinks": 2, "sink_logits": sink_logits, "mask": mask}
    options["seq_idx"] = seq_idx
    q, k = (x.masked_fill(~mask[:, None, :, None], math.nan).requires_grad_() for x in (q, k))
    matrix = window_matrix(q, k, **options)
    for gradient in torch.autograd.grad(matrix.square().sum(), (q, k), retain_graph=True):
        assert gradient.isfinite().all()
    assert matrix.shape == (B, H, 17, 17)
    close(matrix @ v.repeat_interleave(H // K, dim=1), window_attention(q, k, v, **options))
    sums = matrix.sum(-1)[mask[:, None].expand(-1, H, -1)]
    if sink_logits is None:
        close(sums, torch.ones_like(sums))
    else:
        assert sums.max() < 1
    assert not matrix[~mask[:, None].expand(-1, H, -1)].any()
    assert window_matrix(q.float(), k.float(), **options).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_sink_logits_are_absent(backend):
    leaves = [x.requires_grad_() for x in tokens(9)]
    logits = torch.tensor([-INF, 0.5, -INF, -1.0], dtype=torch.float64, requires_grad=True)
    options = {"window": 3, "block_size": 4, "backend": backend}
    plain = window_attention(*leaves, **options)
    y = window_attention(*leaves, **options, sink_logits=logits)
    close(y[:, ::2], plain[:, ::2])
    assert (y[:, 1::2] - plain[:, 1::2]).abs().max() > 0.01
    gradients = torch.autograd.grad(y[:, ::2].sum(), [*leaves, logits], retain_graph=True)
    expected = torch.autograd.grad(plain[:, ::2].sum(), leaves)
    for found, wanted in zip(gradients[:3], expected, strict=True):
        close(found, wanted)
    assert not gradients[3].any()
    (learned,) = torch.autograd.grad(y.sum(), logits)
    assert learned.isfinite().all()
    assert learned[1::2].all()
    assert not learned[::2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_window_attention(backend):
    draw = normal(0)
    shapes = ((1, 2, 5, 2), (1, 1, 5, 2), (1, 1, 5, 2), (2,), (1, 1, 5, 2), (1, 1, 5, 2))
    mask, seq_idx = torch.tensor([[1, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1]])

    def attend(q, k, v, sink_logits, keys, values):
        given = {"past_keys": keys, "past_values": values, "past_counts": torch.tensor([4])}
        given.update(sink_logits=sink_logits, mask=mask, seq_idx=seq_idx)
        return window_attention(q, k, v, **given, window=3, sinks=2, block_size=2, backend=backend)

    assert torch.autograd.gradcheck(attend, [draw(*shape).requires_grad_() for shape in shapes])


@pytest.mark.parametrize("count", [1, 6])
def test_gradcheck_state_and_step(count):
    draw = normal(1)
    shapes = ((1, 2, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2), (2,), (1, 1, 5, 2), (1, 1, 5, 2))

    def step(q, k, v, sink_logits, keys, values):
        given = {"past_keys": keys, "past_values": values, "past_counts": torch.tensor([count])}
        state = window_state(k[:, :, :2], v[:, :, :2], window=3, sinks=2, **given)
        keys, values = state.keys.clone(), state.values.clone()
        one = (x[:, :, 2] for x in (q, k, v))
        y = window_step(*one, keys, values, state.counts, sinks=2, sink_logits=sink_logits)
        return y, keys, values

    assert torch.autograd.gradcheck(step, [draw(*shape).requires_grad_() for shape in shapes])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of an operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            # Views and expanded tensors take no memory of their own.
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.itemsize)
        return result


@pytest.mark.parametrize("sink_logits", [None, torch.zeros(2)])
def test_blocked_memory_is_linear_in_tokens(sink_logits):
    largest = {}
    for length in (2048, 8192):
        q, k, v = torch.zeros(3, 1, 2, length, 4).requires_grad_().unbind()
        mask = torch.ones(1, length, dtype=torch.bool)
        with LargestTensor() as seen:
            y = window_attention(q, k, v, window=64, sinks=4, sink_logits=sink_logits, mask=mask)
            y.sum().backward()
        largest[length] = seen.elements
    # Scores of two heads: first tokens, 63 columns, a block of 128, and the sink logit.
    assert largest[8192] <= 2 * 8192 * (4 + 63 + 128 + 1) < 8192 * 8192 / 20
    assert largest[8192] < 4.1 * largest[2048]


def test_step_changes_one_slot_in_place():
    (q, k, v), (_, a, b) = tokens(1), tokens(20, 1)
    keys, values, counts = window_state(a, b, window=6, sinks=2)
    before, place = keys.clone(), keys.data_ptr()
    y = window_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], keys, values, counts, sinks=2)
    assert (y.shape, keys.data_ptr(), counts.tolist()) == ((B, H * P), place, [20] * B)
    changed = (keys != before).any(-1).any(1)
    assert changed.nonzero()[:, 1].tolist() == [2 + 20 % 6] * B


@pytest.mark.parametrize("sink_logits", [None, torch.zeros(H, device="meta")])
def test_no_op_synchronizes(sink_logits):
    # Tensors on the meta device have no values that could be read.
    q, k, v = (torch.empty(B, heads, 24, P, device="meta") for heads in (H, K, K))
    mask, seq_idx = torch.ones(2, B, 24, dtype=torch.long, device="meta").unbind()
    sizes = {"window": 5, "sinks": 3}
    state = window_state(k, v, **sizes, mask=mask)
    options = {**sizes, **past(state), "mask": mask}
    y = window_attention(q, k, v, **options, sink_logits=sink_logits, seq_idx=seq_idx, block_size=8)
    assert (y.shape, window_state(k, v, **options).keys.shape) == (q.shape, (B, K, 8, P))
    one = (x[:, :, 0] for x in (q, k, v))
    assert window_step(*one, *state, sinks=3, sink_logits=sink_logits).shape == (B, H * P)


def test_empty_calls():
    q, k, v = tokens(0)
    assert window_attention(q, k, v, window=3).shape == (B, H, 0, P)
    assert window_matrix(q, k, window=3).shape == (B, H, 0, 0)
    assert not window_state(k, v, window=3, sinks=1).keys.any()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q": torch.zeros(B, 3, 6, P)}, "q is .* a multiple of K"),
        ({"k": torch.zeros(B, K, 5, P)}, "k is"),
        ({"v": torch.zeros(B, K, 6, 5)}, "v is"),
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"sink_logits": torch.zeros(K)}, "sink_logits is"),
        ({"mask": torch.ones(B, 5)}, "mask is"),
        ({"seq_idx": torch.ones(1, 6)}, "seq_idx is"),
        ({"block_size": 0}, "block_size is 0"),
        ({"past_counts": torch.zeros(B)}, "give all of"),
        ({"past_keys": torch.zeros(B, K, 4, P)}, "past_keys is"),
        ({"past_counts": torch.zeros(1)}, "past_counts is"),
    ],
)
def test_window_attention_names_a_wrong_argument(changed, said):
    q, k, v = tokens(6)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "window": 4, "sinks": 1}
    if "give all" not in said and any(name.startswith("past") for name in changed):
        given.update(past(window_state(k, v, window=4, sinks=1)))
    window_attention(**given)
    with pytest.raises(ValueError, match=f"window_attention: {said}"):
        window_attention(**{**given, **changed})
    with pytest.raises(MmmambaError, match="window_attention: there is no backend 'abacus'"):
        window_attention(**given, backend="abacus")


def test_state_and_step_name_a_wrong_argument():
    q, k, v = tokens(6)
    with pytest.raises(ValueError, match="window_state: v is"):
        window_state(k, v[:, :1], window=3)
    with pytest.raises(ValueError, match="window_state: k is"):
        window_state(k[0], v[0], window=3)
    state = window_state(k, v, window=3)
    one = [x[:, :, 0] for x in (q, k, v)]
    with pytest.raises(ValueError, match="F = 3 and W at least 1"):
        window_step(*one, *state, sinks=3)
    with pytest.raises(ValueError, match="window_step: values is"):
        window_step(*one, state.keys, state.values[:, :, :2], state.counts)
    with pytest.raises(ValueError, match=r"expected \(B, H, P\)"):
        window_step(q, k, v, *state)
