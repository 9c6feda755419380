"""The scans on mamba_ssm and fla, with stand-ins for both, against the recurrence in fp64."""

import importlib
import sys

import pytest
import torch
from library_stubs import MAMBA_INIT, install, none_imported, pretend_gpu
from ops_cases import Scan, make_scan, relative_error

from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops import backends, dispatch, ssd
from mmmamba_cli.ops.backends import optional_backend

LENGTH = 23
MASK = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.7
# Ids that do not start at 0, recur, and change within padding.
PACKING = torch.stack([torch.arange(LENGTH) // 5 % 2 + 3, torch.arange(LENGTH) // 9])
LAYOUTS = {
    "plain": {},
    "padded": {"mask": MASK},
    "packed": {"seq_idx": PACKING},
    "both": {"mask": MASK, "seq_idx": PACKING},
}
both = pytest.mark.parametrize("backend", ["mamba_ssm", "fla"])


@pytest.fixture(autouse=True)
def libraries(tmp_path, monkeypatch):
    with none_imported():
        install(tmp_path, monkeypatch)
        pretend_gpu(monkeypatch, torch.float64)
        yield


def problem(seed: int = 0, **sizes: object) -> Scan:
    return make_scan(seed, length=LENGTH, **sizes)


def spoilt(scan: Scan, mask: torch.Tensor | None) -> Scan:
    """Fill the padding with NaN."""
    for name in () if mask is None else ("x", "dt", "B", "C"):
        getattr(scan, name)[~mask] = torch.nan
    return scan


def check(scan: Scan, backend: str, **options: object) -> None:
    with torch.no_grad():
        wanted = ssd(**scan.tensors(), **options, backend="recurrent")
        found = ssd(**spoilt(scan, options.get("mask")).tensors(), **options, backend=backend)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert relative_error(a, b) < 1e-10
    if "mask" in options:
        assert (found[0][~options["mask"]] == 0).all()


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optional", [True, False])
def test_every_layout_equals_the_recurrence(backend, layout, optional):
    if backend == "fla" and "seq_idx" in LAYOUTS[layout]:
        return
    check(problem(optional=optional), backend, dt_softplus=True, **LAYOUTS[layout])


@both
@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_grouped_heads(backend, kv_heads, groups):
    check(problem(1, kv_heads=kv_heads, groups=groups), backend, dt_softplus=True)


@both
def test_negative_step_sizes_are_not_clamped(backend):
    scan = problem(2)
    scan.dt = scan.dt / 100
    assert (scan.dt < 0).any()
    check(scan, backend)


@both
def test_output_dtypes_for_bf16(backend):
    scan = problem(3).to(torch.float32)
    for name in ("x", "dt", "B", "C"):
        setattr(scan, name, getattr(scan, name).bfloat16())
    wanted = ssd(**scan.to(torch.float64).tensors(), dt_softplus=True, backend="recurrent")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = ssd(**scan.tensors(), dt_softplus=True, backend=backend)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_through_mamba_ssm(layout):
    options = LAYOUTS[layout]
    found = spoilt(problem(4), options.get("mask")).with_gradients()
    wanted = problem(4).with_gradients()
    for scan, backend in ((found, "mamba_ssm"), (wanted, "recurrent")):
        y, state = ssd(**scan.tensors(), **options, dt_softplus=True, backend=backend)
        (y.square().sum() + state.pow(3).sum()).backward()
    for name, gradient in found.gradients().items():
        assert relative_error(gradient, wanted.gradients()[name]) < 1e-10, name


def test_unsupported_inputs_are_rejected_with_the_reason():
    scan = problem(5)
    fla = {**scan.tensors(), "backend": "fla"}
    with pytest.raises(MmmambaError, match=r"the fla backend takes no packed rows \(seq_idx\)"):
        ssd(**fla, seq_idx=PACKING)
    with pytest.raises(MmmambaError, match="the fla backend has no gradient that can be relied on"):
        ssd(**{**fla, "x": scan.x.clone().requires_grad_()})
    with torch.no_grad():
        ssd(**{**fla, "x": scan.x.clone().requires_grad_()})
    wide = make_scan(5, batch=1, length=2, value_dim=300)
    with pytest.raises(MmmambaError, match=r"mamba_ssm backend takes .* at most 256 .*not 300 and"):
        ssd(**wide.tensors(), backend="mamba_ssm")


@both
def test_cpu_and_fp32_are_rejected_with_the_reason(backend, monkeypatch):
    with pytest.raises(MmmambaError, match=rf"the {backend} backend multiplies x, B and C in bf"):
        ssd(**problem(6).to(torch.float32).tensors(), backend=backend)
    monkeypatch.setattr(dispatch, "supports_triton", backends.supports_triton)
    with pytest.raises(MmmambaError, match=rf"ssd: the {backend} backend needs tensors on a GPU"):
        ssd(**problem(6).to(torch.bfloat16).tensors(), backend=backend)


def test_missing_library_or_module_is_no_backend():
    where = "mmmamba_cli.ops.ssd.fla"
    assert optional_backend("fla", where, "scan", "fla_that_is_not_there") == {}
    assert optional_backend("fla", where + "_of_an_export", "scan", "fla") == {}
    assert optional_backend("fla", "folder_of_an_export.ssd.fla", "scan", "fla") == {}


def test_libraries_are_imported_on_the_first_call():
    assert "fla" not in sys.modules and "mamba_ssm" not in sys.modules
    check(problem(7), "fla")
    assert "fla.ops.simple_gla" in sys.modules and "mamba_ssm" not in sys.modules


def test_mamba_ssm_without_its_cuda_extension(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, **{"mamba_ssm/__init__.py": MAMBA_INIT})
    check(problem(8), "mamba_ssm", dt_softplus=True)
    # A later import still reports the missing extension.
    with pytest.raises(ImportError, match="selective_scan_cuda_of_a_stand_in"):
        importlib.import_module("mamba_ssm")


@pytest.mark.parametrize(
    ("backend", "file"),
    [
        ("mamba_ssm", "mamba_ssm/ops/triton/ssd_combined.py"),
        ("fla", "fla/ops/simple_gla/__init__.py"),
    ],
)
@pytest.mark.parametrize("text", ["import what_it_misses\n", "other = 1\n"])
def test_broken_library_is_a_readable_error(backend, file, text, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, **{file: text})
    with pytest.raises(MmmambaError, match=f"ssd: the {backend} backend cannot be imported: "):
        ssd(**problem(9).tensors(), backend=backend)
