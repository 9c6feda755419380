"""Checks of scan backends of other libraries, and of the backend that `auto` selects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from library_stubs import none_imported, pretend_gpu

from mmmamba_cli.doctor import diagnosis
from mmmamba_cli.doctor.op_cases import op_specs
from mmmamba_cli.doctor.op_checks import check_backend, check_scan_backend
from mmmamba_cli.doctor.op_spec import OpSpec
from mmmamba_cli.doctor.report import DoctorReport
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.ssd import SCAN_BACKENDS, reference
from mmmamba_cli.ops.ssd.reference import ScanInputs

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def wrong(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    y, state = reference.chunked(inputs)
    return 2 * y, state


def forward_only(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.x.requires_grad:
        raise MmmambaError("no gradients")
    return reference.chunked(inputs)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the references are registered, whatever is installed."""
    with none_imported():
        for name in set(SCAN_BACKENDS) - {"chunked", "recurrent"}:
            monkeypatch.delitem(SCAN_BACKENDS, name)
        yield


def scans() -> OpSpec:
    return next(op for op in op_specs() if op.name == "ssd")


def test_auto_uses_the_reference_on_a_cpu(plain: None) -> None:
    check = check_scan_backend(CPU)
    assert (check.status, check.said) == ("ok", "there are chunked, recurrent; auto takes chunked")


def test_available_and_selected_backends_are_listed(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setitem(SCAN_BACKENDS, "fla", reference.chunked)
    check = check_scan_backend(CPU)
    assert check.status == "ok"
    assert check.said == (
        "there are chunked, recurrent, fla; auto takes fla (bfloat16), "
        "chunked (bfloat16 in training; float32; float32 in training)"
    )


def test_skipped_backend_is_a_warning(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setitem(SCAN_BACKENDS, "mamba_ssm", wrong)
    check = check_scan_backend(CPU)
    assert check.status == "warning"
    assert "auto takes chunked. ssd: auto passes over the mamba_ssm backend in bf" in check.said
    op = check_backend(scans(), "mamba_ssm", CPU, BF16)
    assert op.status == "warning"
    report = DoctorReport((), (), "cpu", (check,), (op,))
    assert list(report.failures) == []
    assert [said.partition(":")[0] for said in report.warnings] == [
        "scan",
        "ssd, mamba_ssm, bfloat16",
    ]
    # The triton backend is not optional.
    monkeypatch.setitem(SCAN_BACKENDS, "triton", wrong)
    assert check_backend(scans(), "triton", CPU, BF16).status == "failed"


def test_forward_only_backends(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCAN_BACKENDS, "fla", forward_only)
    found = check_backend(scans(), "fla", CPU, BF16)
    assert found.status == "ok", found.sentence
    assert found.forward is not None
    assert found.backward is None
    monkeypatch.setitem(SCAN_BACKENDS, "mamba_ssm", forward_only)
    assert check_backend(scans(), "mamba_ssm", CPU, BF16).status == "skipped"


def test_diagnosis_includes_the_scan_check(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_check_ops", lambda device, progress: ())
    report = diagnosis.diagnose("cpu")
    assert [check.name for check in report.checks][-1] == "scan"
