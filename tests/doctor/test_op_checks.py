"""What the doctor says of scans from other libraries, and of the one that `auto` takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from foreign_scans import none_imported, pretend_gpu

from mmmamba_cli.doctor import diagnosis
from mmmamba_cli.doctor.op_cases import OpSpec, op_specs
from mmmamba_cli.doctor.op_checks import check_backend, check_scan_backend
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
    """Nothing but the references, whatever is installed."""
    with none_imported():
        for name in set(SCAN_BACKENDS) - {"chunked", "recurrent"}:
            monkeypatch.delitem(SCAN_BACKENDS, name)
        yield


def scans() -> OpSpec:
    return next(op for op in op_specs() if op.name == "ssd")


def test_a_cpu_gets_the_reference(plain: None) -> None:
    check = check_scan_backend(CPU)
    assert (check.status, check.said) == ("ok", "there are chunked, recurrent; auto takes chunked")


def test_it_says_what_is_there_and_what_is_taken(
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


def test_one_that_is_passed_over_is_a_warning_and_no_failure(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    # Ours is no library that can be left out.
    monkeypatch.setitem(SCAN_BACKENDS, "triton", wrong)
    assert check_backend(scans(), "triton", CPU, BF16).status == "failed"


def test_a_backend_without_gradients_is_checked_forwards(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCAN_BACKENDS, "fla", forward_only)
    found = check_backend(scans(), "fla", CPU, BF16)
    assert found.status == "ok", found.sentence
    assert found.forward is not None
    assert found.backward is None
    monkeypatch.setitem(SCAN_BACKENDS, "mamba_ssm", forward_only)
    assert check_backend(scans(), "mamba_ssm", CPU, BF16).status == "skipped"


def test_an_examination_has_it(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_check_ops", lambda device, progress: ())
    report = diagnosis.diagnose("cpu")
    assert [check.name for check in report.checks][-1] == "scan"
