"""Delta rules and GLA on fla, with stand-ins for its kernels; when `auto` takes it."""

import warnings

import pytest
import torch
from library_stubs import install, none_imported, pretend_gpu
from ops_cases import relative_error
from recurrence_cases import Recurrence, make_recurrence

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import backends, dispatch
from mmmamba_cli.ops.delta import DELTA_BACKENDS, reference
from mmmamba_cli.ops.dispatch import LENGTH

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
MASK = torch.rand(2, 23, generator=torch.Generator().manual_seed(1)) < 0.7
kinds = pytest.mark.parametrize("kind", ["delta", "kda", "gla"])
FUNCTIONS = {
    "delta": "gated_delta_rule/__init__.py",
    "kda": "kda/__init__.py",
    "gla": "gla/__init__.py",
}


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    with none_imported():
        install(tmp_path, monkeypatch)
        pretend_gpu(monkeypatch, FP64)
        # The fp64 that these tests add needs a tolerance of the self-test.
        monkeypatch.setitem(dispatch.TOLERANCES, FP64, 1e-10)
        yield


def check(case: Recurrence, **options: object) -> None:
    """Compare fla, with NaN at padding, to the recurrence in fp64."""
    expected = case.run(**options, backend="recurrent")
    if "mask" in options:
        for name in ("v", "k", "q", "log_decay"):
            getattr(case, name)[~options["mask"]] = torch.nan
    with torch.no_grad():
        found = case.run(**options, backend="fla")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert relative_error(a, b) < 1e-10
    if "mask" in options:
        assert (found[0][~options["mask"]] == 0).all()


@kinds
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("padding", [{}, {"mask": MASK}])
def test_fla_equals_the_recurrence(kind, optional, padding):
    check(make_recurrence(kind, 0, length=23, optional=optional), **padding)
    check(make_recurrence(kind, 1, length=23, kv_heads=1, groups=3), **padding, scale=0.3)


def test_norms_of_queries_and_keys_on_fla():
    case = make_recurrence("kda", 2, length=23)
    case.q, case.k = 3 * case.q, 5 * case.k
    check(case, qk_l2_norm=True)


@kinds
def test_output_dtypes_for_bf16(kind):
    case = make_recurrence(kind, 3, length=23, dtype=FP32)
    for name in ("v", "k", "q"):
        setattr(case, name, getattr(case, name).bfloat16())
    expected = case.to(FP64).run(backend="recurrent")
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        found = case.run(backend="fla")
    assert [t.dtype for t in found] == [BF16, FP32]
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-2


@kinds
def test_unsupported_inputs_are_rejected_with_the_reason(kind, monkeypatch):
    case = make_recurrence(kind, 4)
    packing = torch.zeros(2, 7, dtype=torch.long)
    with pytest.raises(MmmambaError, match=f"{case.op}: the fla backend takes no packed rows"):
        case.run(backend="fla", seq_idx=packing)
    with pytest.raises(MmmambaError, match="the fla backend has no gradient that can be relied on"):
        case.with_gradients().run(backend="fla")
    with pytest.raises(MmmambaError, match="the fla backend multiplies v, k and q in bfloat16"):
        case.to(FP32).run(backend="fla")
    monkeypatch.setattr(dispatch, "supports_triton", backends.supports_triton)
    with pytest.raises(MmmambaError, match="the fla backend needs tensors on a GPU"):
        case.to(BF16).run(backend="fla")


@kinds
@pytest.mark.parametrize("text", ["import what_it_misses\n", "other = 1\n"])
def test_broken_library_is_a_readable_error(kind, text, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, **{f"fla/ops/{FUNCTIONS[kind]}": text})
    case = make_recurrence(kind, 5)
    with pytest.raises(MmmambaError, match=f"{case.op}: the fla backend cannot be imported: "):
        case.run(backend="fla")
    with pytest.warns(RuntimeWarning, match=f"{case.op} with .*: auto passes over the fla backend"):
        found = case.run()
    for a, b in zip(found, case.run(backend="chunked"), strict=True):
        assert torch.equal(a, b)


class Stand:
    """The chunked reference with a record of its calls; wrong for some kinds of decay."""

    def __init__(self, wrong_dims=()):
        self.lengths = []
        self.wrong_dims = wrong_dims

    def __call__(self, inputs):
        self.lengths.append(inputs.v.shape[1])
        y, state = reference.chunked(inputs)
        return (1.1 * y, state) if inputs.log_decay.dim() in self.wrong_dims else (y, state)


def test_auto_takes_fla_where_it_passes_the_self_test(monkeypatch):
    stand = Stand(wrong_dims=(4,))
    monkeypatch.setitem(DELTA_BACKENDS, "fla", stand)
    delta, kda = (make_recurrence(kind, 6).to(BF16) for kind in ("delta", "kda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.run()
        delta.run()
        make_recurrence("delta", 6, length=1).to(BF16).run()
    assert stand.lengths == [LENGTH, 7, 7]
    # A decay per channel is another kernel.
    with pytest.warns(RuntimeWarning, match=r"delta_rule with a decay per channel.*y is off by"):
        kda.run()
    assert stand.lengths == [LENGTH, 7, 7, LENGTH]
    delta.with_gradients().run()
    delta.run(seq_idx=torch.zeros(2, 7, dtype=torch.long))
    delta.to(FP32).run()
    assert len(stand.lengths) == 4


def test_auto_compiles_and_runs_no_self_test_then(monkeypatch):
    stand = Stand()
    monkeypatch.setitem(DELTA_BACKENDS, "fla", stand)
    case = make_recurrence("kda", 7)
    compiled = torch.compile(
        lambda **given: Recurrence("kda", **given).run(), backend="eager", fullgraph=True
    )
    y, _ = compiled(**case.tensors())
    assert relative_error(y, case.run(backend="recurrent")[0]) < 1e-10
    assert stand.lengths == [7]


@kinds
@pytest.mark.parametrize("dtype", [BF16, FP64])
def test_fla_stand_in_passes_the_self_test(kind, dtype):
    case = make_recurrence(kind, 8).to(dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run()
    assert list(dispatch._results.values()) == [True]
