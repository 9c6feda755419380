"""Triton decoding steps against the references in fp64, states and caches included."""

import pytest
import torch
from decode_cases import Sizes, angles, mixer_weights, random
from ops_cases import relative_error
from torch import Tensor
from triton_device import (
    DEVICE,
    INTERPRETED,
    TOLERANCE,
    dtypes,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import attention_step, greedy_argmax, mixer_step
from mmmamba_cli.ops.decode import MixerWeights, fused

FP32, BF16 = torch.float32, torch.bfloat16


def side_by_side(*parts: Tensor) -> list[Tensor]:
    """The same tensors as slices of one packed projection."""
    wide = torch.cat([part.flatten(1) for part in parts], 1).to(DEVICE)
    sizes = [part[0].numel() for part in parts]
    return [
        found.unflatten(1, part.shape[1:])
        for found, part in zip(wide.split(sizes, 1), parts, strict=True)
    ]


def moved(weights: MixerWeights, dtype: torch.dtype | None = None) -> MixerWeights:
    there = "cpu" if dtype else DEVICE
    return MixerWeights(*(None if w is None else w.to(there, dtype or w.dtype) for w in weights))


def check_mixer(
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    tokens: int = 1,
    without: str = "",
    inputs_ready: bool = False,
) -> None:
    normal, tolerance = random(0, dtype), TOLERANCE[dtype]
    weights = mixer_weights(sizes, dtype, without=without)
    ring = normal(sizes.batch, sizes.channels, sizes.taps)
    state = random(2, FP32)(sizes.batch, sizes.heads, sizes.P, sizes.N)
    ring_here, state_here = ring.to(DEVICE).clone(), state.to(DEVICE).clone()
    ring, state = ring.double(), state.double()
    for t in range(5, 5 + tokens):
        vkq, dt = normal(sizes.batch, sizes.channels), normal(sizes.batch, sizes.heads)
        # The token's own slot must not be read.
        ring_here[..., t % sizes.taps] = torch.nan
        given = (vkq.double(), dt.double(), ring, state, torch.tensor([t]))
        wanted = mixer_step(*given, moved(weights, torch.float64), backend="reference")
        here, at = moved(weights), torch.tensor([t], device=DEVICE)
        # vkq and dt are made last: `inputs_ready` means that everything else was written earlier.
        vkq, dt, _ = side_by_side(vkq, dt, torch.full_like(vkq, torch.nan))
        found = mixer_step(
            vkq, dt, ring_here, state_here, at, here, inputs_ready=inputs_ready, backend="triton"
        )
        assert found.dtype == dtype
        assert relative_error(found.cpu(), wanted) < tolerance, t
        assert torch.equal(ring_here.cpu().double(), ring), t
        assert relative_error(state_here.cpu(), state) < tolerance, t


@dtypes
@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("without", ["", "conv_bias", "dt_bias", "D"])
def test_mixer_steps_equal_the_reference(taps, without, dtype):
    check_mixer(Sizes(taps=taps), dtype, tokens=5, without=without)


@dtypes
@pytest.mark.parametrize("without", ["", "conv_bias"])
def test_mixer_steps_with_inputs_ready_equal_the_reference(without, dtype):
    check_mixer(Sizes(), dtype, tokens=5, without=without, inputs_ready=True)
    check_mixer(Sizes(batch=5, kv_heads=3, share=1, P=40, N=3, taps=1), dtype, inputs_ready=True)


def single_program_inputs(normal) -> tuple[list[Tensor], MixerWeights]:
    """Inputs and weights of a mixer step that is a single program."""
    sizes = Sizes(batch=1, kv_heads=1, share=1)
    ring, state = normal(1, sizes.channels, sizes.taps), normal(1, 1, sizes.P, sizes.N)
    vkq, dt = normal(1, sizes.channels), normal(1, 1)
    return [vkq, dt, ring, state, torch.tensor([6])], mixer_weights(sizes, FP32)


@pytest.mark.skipif(
    not INTERPRETED, reason="only the interpreter can run code where a kernel waits"
)
@pytest.mark.parametrize("inputs_ready", [False, True])
def test_inputs_read_before_the_previous_launch_ends(monkeypatch, inputs_ready):
    given, weights = single_program_inputs(random(0, FP32))
    wanted, given = [t.clone() for t in given], [t.clone() for t in given]
    y = mixer_step(*wanted, weights, backend="reference")
    made, states = given[:2], given[2:]
    correct = [t.clone() for t in given]

    def corrupt(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    def wait(overlap: object) -> None:
        for tensor, value in zip(given, correct, strict=True):
            tensor.copy_(value)
        if inputs_ready:
            # The kernel must have read them before the wait.
            corrupt(states)

    corrupt(made if inputs_ready else given)
    monkeypatch.setattr(fused.kernels, "wait_for_inputs", wait)
    found = mixer_step(*given, weights, inputs_ready=inputs_ready, backend="triton")
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(given[3], wanted[3])
    slot = 6 % correct[2].shape[-1]
    assert torch.equal(given[2][..., slot], correct[0])


def test_a_copied_weight_is_not_ready(monkeypatch):
    given, weights = single_program_inputs(random(0, FP32))
    given = [t.to(DEVICE) for t in given]
    weights = moved(weights)
    transposed = weights._replace(conv_weight=weights.conv_weight.mT.contiguous().mT)
    taken = []
    launch = fused.kernels.mixer_step

    class Watched:
        def __getitem__(self, grid):
            def run(*arguments, **options):
                taken.append(options["INPUTS_READY"])
                return launch[grid](*arguments, **options)

            return run

    monkeypatch.setattr(fused.kernels, "mixer_step", Watched())
    for chosen in (weights, transposed):
        mixer_step(*given, chosen, inputs_ready=True, backend="triton")
    assert taken == [True, False]


@dtypes
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(batch=1, kv_heads=1, share=1, P=1, N=1),
        Sizes(batch=5, kv_heads=3, share=1, P=40, N=3),
        Sizes(batch=8, kv_heads=1, share=3, P=17, N=33),
        Sizes(batch=1, kv_heads=2, share=2, P=64, N=16, taps=2),
    ],
)
def test_mixers_of_any_size(monkeypatch, sizes, dtype):
    monkeypatch.setattr(fused, "LARGE_BATCH_BLOCK_P", 8)
    check_mixer(sizes, dtype, tokens=2)


def test_states_that_cannot_be_updated_in_place_are_refused():
    sizes = Sizes()
    zeros = [torch.zeros(2, 42), torch.zeros(2, 4), torch.zeros(2, 42, 4), torch.zeros(2, 4, 5, 6)]
    vkq, dt, ring, state = (tensor.to(DEVICE) for tensor in zeros)
    at, weights = torch.tensor([0], device=DEVICE), moved(mixer_weights(sizes, FP32))
    with pytest.raises(ValueError, match="not contiguous"):
        mixer_step(vkq, dt, ring, state.mT, at, weights, backend="triton")
    with pytest.raises(ValueError, match="fp32"):
        mixer_step(vkq, dt, ring, state.mT.contiguous().half(), at, weights, backend="triton")


def check_attention(
    dtype: torch.dtype,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    share: int = 2,
    dim: int = 8,
    capacity: int = 50,
    columns: tuple[int, ...] = (0, 1, 30, 49),
    starts: tuple[int, ...] | None = None,
    tolerance: float | None = None,
) -> None:
    normal = random(3, dtype)
    cache = [normal(batch, kv_heads, capacity, dim) for _ in range(2)]
    here = [tensor.to(DEVICE).clone() for tensor in cache]
    cache = [tensor.double() for tensor in cache]
    first = None if starts is None else torch.tensor(starts)
    for column in columns:
        for tensor in here:
            # Columns after the position and before a start must not be read.
            tensor[:, :, column:] = torch.nan
            for row, start in enumerate(starts or ()):
                tensor[row, :, :start] = torch.nan
        parts = [normal(batch, heads, dim) for heads in (kv_heads * share, kv_heads, kv_heads)]
        cos, sin = angles(torch.tensor([column]), dim)
        at = torch.tensor([column])
        exact = [part.double() for part in parts]
        cos, sin = cos.to(dtype), sin.to(dtype)
        wanted = attention_step(
            *exact, *cache, at, first, cos.double(), sin.double(), backend="reference"
        )
        found = attention_step(
            *side_by_side(*parts),
            *here,
            at.to(DEVICE),
            None if first is None else first.to(DEVICE),
            cos.to(DEVICE),
            sin.to(DEVICE),
            backend="triton",
        )
        limit = tolerance or TOLERANCE[dtype]
        assert found.dtype == dtype
        assert relative_error(found.cpu(), wanted) < limit, column
        for tensor, kept in zip(here, cache, strict=True):
            assert relative_error(tensor[:, :, column].cpu(), kept[:, :, column]) < limit
            assert tensor[:, :, column + 1 :].isnan().all()
            # Continue from the cache of the reference.
            tensor.copy_(kept)


@dtypes
@pytest.mark.parametrize("programs", [1, 8, 264])
def test_attention_equals_the_reference(monkeypatch, programs, dtype):
    monkeypatch.setattr(fused, "ATTENTION_PROGRAMS", programs)
    monkeypatch.setattr(fused, "ATTENTION_BLOCK_S", {2: 16, 4: 16})
    check_attention(dtype, columns=(0, 1, 16, 17, 33, 49))


@dtypes
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_start_after_their_padding(monkeypatch, batch, dtype):
    monkeypatch.setattr(fused, "ATTENTION_BLOCK_S", {2: 16, 4: 16})
    starts = (30, 0, 7)[:batch]
    check_attention(dtype, batch=batch, starts=starts, columns=(30, 31, 49))


@pytest.mark.parametrize(
    ("kv_heads", "share", "dim"), [(1, 1, 2), (1, 17, 4), (3, 1, 20), (2, 3, 64)]
)
def test_attention_of_any_size(kv_heads, share, dim):
    check_attention(
        FP32, batch=1, kv_heads=kv_heads, share=share, dim=dim, capacity=40, columns=(39,)
    )


def test_attention_in_fp16():
    check_attention(torch.float16, tolerance=2e-3)


def test_rows_with_different_rope_angles():
    normal = random(4, FP32)
    cos, sin = (t.float() for t in angles(torch.tensor([5, 9]), 8))
    q, k, v = normal(2, 4, 8), normal(2, 2, 8), normal(2, 2, 8)
    cache = normal(2, 2, 2, 12, 8)
    at = torch.tensor([9])
    wanted = attention_step(q, k, v, *cache.clone(), at, None, cos, sin, backend="reference")
    here = [t.to(DEVICE) for t in (q, k, v, *cache.clone(), at)]
    found = attention_step(*here, None, cos.to(DEVICE), sin.to(DEVICE), backend="triton")
    assert relative_error(found.cpu(), wanted) < TOLERANCE[FP32]


def test_a_transposed_cache_is_refused():
    normal = random(4, FP32)
    q, k, v = (normal(1, 2, 8).to(DEVICE) for _ in range(3))
    keys = normal(1, 2, 8, 12).to(DEVICE).mT
    cos, sin = (t.float().to(DEVICE) for t in angles(torch.tensor([5]), 8))
    at = torch.tensor([5], device=DEVICE)
    with pytest.raises(ValueError, match="side by side in the cache"):
        attention_step(q, k, v, keys, keys, at, None, cos, sin, backend="triton")


@dtypes
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 31), (2, 1024), (2, 5000), (1, 40000)])
def test_greedy_argmax_of_any_size(batch, size, dtype):
    # Integers up to 200 are exact in bf16; many are equal, and the first one is chosen.
    logits = (random(0, FP32)(batch, size) * 100).round().clamp(-200, 200).to(dtype)
    suppressed = torch.zeros(size, dtype=torch.bool)
    for _ in range(3):
        wanted = logits.double().masked_fill(suppressed, -torch.inf)
        first = (wanted == wanted.amax(-1, keepdim=True)).int().argmax(-1)
        wide = torch.full((batch, size + 7), torch.nan, dtype=dtype)
        wide[:, :size] = logits
        found = greedy_argmax(wide.to(DEVICE)[:, :size], suppressed.to(DEVICE), backend="triton")
        assert torch.equal(found.cpu(), first)
        suppressed[first[: size - 1]] = True


def test_greedy_argmax_with_all_ids_suppressed():
    logits, suppressed = torch.zeros(2, 70, device=DEVICE), torch.ones(70, dtype=torch.bool)
    found = greedy_argmax(logits, suppressed.to(DEVICE), backend="triton")
    assert all(0 <= token < 70 for token in found.tolist())


def test_fp64_is_refused():
    weights = moved(mixer_weights(Sizes()), torch.float64)
    zeros = (torch.zeros(2, 42), torch.zeros(2, 4), torch.zeros(2, 42, 4), torch.zeros(2, 4, 6, 5))
    with pytest.raises(MmmambaError, match="bf16, fp16 and fp32"):
        mixer_step(*(z.double() for z in zeros), torch.tensor([0]), weights, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours for so many programs")
def test_more_rows_than_the_second_axis_of_a_grid():
    normal, batch, heads, kv_heads, dim = random(8, BF16), 4100, 16, 4, 16
    q, k, v = (normal(batch, count, dim).to(DEVICE) for count in (heads, kv_heads, kv_heads))
    keys, values = (normal(batch, kv_heads, 9, dim).to(DEVICE) for _ in range(2))
    position = torch.tensor([7], device=DEVICE)
    cos, sin = (t.float().to(DEVICE) for t in angles(torch.tensor([7]), dim))
    given = (q, k, v, keys, values)
    wanted = attention_step(
        *(t.double() for t in given), position, None, cos.double(), sin.double()
    )
    found = attention_step(*(t.clone() for t in given), position, None, cos, sin, backend="triton")
    assert relative_error(found.cpu(), wanted.cpu()) < TOLERANCE[BF16]
    logits = normal(70_000, 40).to(DEVICE)
    suppressed = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    best = greedy_argmax(logits, suppressed, backend="triton")
    assert torch.equal(logits.gather(1, best[:, None])[:, 0], logits.amax(1))
