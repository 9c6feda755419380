"""The diagnosis: cheap checks first; it ends early if torch or the model cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmmamba_cli.doctor.environment import cpu, devices, packages
from mmmamba_cli.doctor.known_issues import DRIVER, SystemFacts, check_known_issues, check_versions
from mmmamba_cli.doctor.library_checks import check_resizing, check_tokenizer
from mmmamba_cli.doctor.report import (
    FAILED,
    OK,
    Check,
    DeviceInfo,
    DoctorReport,
    OpCheck,
    PackageInfo,
)
from mmmamba_cli.doctor.teacher_check import check_teachers
from mmmamba_cli.versions import TORCHVISION_REMEDY, torchvision_problem

Progress = Callable[[str], object]


def diagnose(device: str | None = None, progress: Progress = lambda text: None) -> DoctorReport:
    """Check versions, devices and libraries, and all ops on `device` (CUDA if available, if None).

    `progress` is called with a line of text before slow checks. Problems are in the report.

    Raises:
        MmmambaError: a device that does not exist.
    """
    found = packages()
    refused = _check_imports()
    if refused is not None:
        checks = (*_check_versions(found, (cpu(),), "cpu"), refused)
        return DoctorReport(found, (cpu(),), "cpu", checks, ())
    from mmmamba_cli.devices import pick_device

    chosen = pick_device(device)
    there = devices()
    checks = (
        *_check_versions(found, there, str(chosen)),
        Check("torch and transformers", OK, "can be imported"),
        check_tokenizer(),
        check_resizing(),
        check_teachers(),
    )
    progress(f"checking ops on {chosen}")
    checked = _check_ops(str(chosen), progress)
    return DoctorReport(found, there, str(chosen), (*checks, _check_scan(str(chosen))), checked)


def _check_versions(
    found: tuple[PackageInfo, ...], there: tuple[DeviceInfo, ...], device: str
) -> tuple[Check, ...]:
    facts = SystemFacts(
        versions={p.name: p.version for p in found if p.version is not None},
        devices=there,
        device=device,
        driver=Path(DRIVER).exists(),
        fast_fp32=_fast_fp32(),
    )
    return (*check_versions(facts), *check_known_issues(facts))


def _check_imports() -> Check | None:
    """A failed check if torch, transformers or the model cannot be imported."""
    for name in ("torch", "transformers", "mmmamba_cli.model"):
        try:
            __import__(name)
        except Exception as error:  # noqa: BLE001  a broken installation may raise anything
            problem = torchvision_problem(error)
            if problem is not None:
                return Check("torchvision", FAILED, problem, TORCHVISION_REMEDY)
            first = (str(error).strip().splitlines() or [""])[0]
            return Check(
                name, FAILED, f"cannot be imported: {type(error).__name__}: {first}", "reinstall it"
            )
    return None


def _fast_fp32() -> bool:
    """Whether fp32 matmuls use TF32 or bf16."""
    try:
        import torch

        return torch.get_float32_matmul_precision() != "highest"
    except ImportError:
        return False


def _check_ops(device: str, progress: Progress) -> tuple[OpCheck, ...]:
    import torch

    from mmmamba_cli.doctor.op_checks import check_ops

    return tuple(
        check_ops(torch.device(device), (torch.float32, torch.bfloat16), progress=progress)
    )


def _check_scan(device: str) -> Check:
    import torch

    from mmmamba_cli.doctor.op_checks import check_scan_backend

    return check_scan_backend(torch.device(device))
