"""One examination, from the cheapest to the dearest; what cannot be imported ends it early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmmamba_cli.doctor.environment import cpu, devices, packages
from mmmamba_cli.doctor.known_issues import DRIVER, Facts, examine_versions, known_problems
from mmmamba_cli.doctor.library_checks import check_resizing, check_tokenizer
from mmmamba_cli.doctor.report import FAILED, OK, Check, Device, OpCheck, Package, Report

Say = Callable[[str], object]


def examine(device: str | None = None, say: Say = lambda text: None) -> Report:
    """Look over this machine, and check all ops on `device` (CUDA where there is one, if None).

    Raises `CheckpointError` for a device that is not there. Whatever is broken is in the report.
    """
    found = packages()
    refused = _import_problem()
    if refused is not None:
        checks = (*_versions(found, (cpu(),), "cpu"), refused)
        return Report(found, (cpu(),), "cpu", checks, ())
    from mmmamba_cli.devices import pick_device

    chosen = pick_device(device)
    there = devices()
    checks = (
        *_versions(found, there, str(chosen)),
        Check("torch and transformers", OK, "can be imported"),
        check_tokenizer(),
        check_resizing(),
    )
    say(f"checking ops on {chosen}")
    checked = _ops(str(chosen), say)
    return Report(found, there, str(chosen), (*checks, _scan(str(chosen))), checked)


def _versions(
    found: tuple[Package, ...], there: tuple[Device, ...], device: str
) -> tuple[Check, ...]:
    facts = Facts(
        versions={p.name: p.version for p in found if p.version is not None},
        devices=there,
        device=device,
        driver=Path(DRIVER).exists(),
        fast_fp32=_fast_fp32(),
    )
    return (*examine_versions(facts), *known_problems(facts))


def _import_problem() -> Check | None:
    """What hinders torch, transformers or our own model from being imported."""
    for name in ("torch", "transformers", "mmmamba_cli.model"):
        try:
            __import__(name)
        except Exception as error:  # noqa: BLE001  a broken installation may raise anything
            first = (str(error).strip().splitlines() or [""])[0]
            return Check(
                name, FAILED, f"cannot be imported: {type(error).__name__}: {first}", "reinstall it"
            )
    return None


def _fast_fp32() -> bool:
    """Whether fp32 products are computed with fewer bits than they have."""
    try:
        import torch

        return torch.get_float32_matmul_precision() != "highest"
    except ImportError:
        return False


def _ops(device: str, say: Say) -> tuple[OpCheck, ...]:
    import torch

    from mmmamba_cli.doctor.op_checks import check_ops

    return tuple(check_ops(torch.device(device), (torch.float32, torch.bfloat16), say=say))


def _scan(device: str) -> Check:
    import torch

    from mmmamba_cli.doctor.op_checks import check_choice

    return check_choice(torch.device(device))
