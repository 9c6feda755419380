"""`mmmamba doctor`: check this machine and every op."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import (
    print_error,
    print_json,
    print_line,
    print_table,
    print_text,
    print_warning,
)
from mmmamba_cli.cli.options import AsJson

if TYPE_CHECKING:
    from mmmamba_cli.doctor import DeviceInfo, DoctorReport, PackageInfo

EXIT_UNFIT = 2


def command(
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="Device for the ops: cpu or cuda (default: cuda if available)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, and every op against its reference.

    Exit code 0 if everything needed works, else 2.
    """
    from mmmamba_cli.doctor import diagnose

    report = diagnose(device, _print_status)
    failures = list(report.failures)
    if as_json:
        print_json({"fit": not failures, "failures": failures, **_record(report)})
    else:
        _print_report(report)
        for sentence in report.warnings:
            print_warning(sentence)
        for sentence in failures:
            print_error(sentence)
        if not failures:
            print_line(f"fit: everything that is needed works, on {report.device}")
    if failures:
        raise typer.Exit(EXIT_UNFIT)


def _print_status(text: str) -> None:
    print_line(text, style="dim", to_stderr=True)


def _record(report: DoctorReport) -> dict[str, object]:
    """The report as JSON, with "nan" for NaN."""
    record = asdict(report)
    for op in record["ops"]:
        for key in ("forward", "backward"):
            op[key] = "nan" if op[key] != op[key] else op[key]
    return record


def _print_report(report: DoctorReport) -> None:
    needed = [package for package in report.packages if package.extra is None]
    print_table(
        ("library", "version", "needed"),
        [(p.name, p.version or "missing", p.needs or None) for p in needed],
    )
    print_text()
    print_table(
        ("device", "is", "memory", "free", "own bf16"),
        [_device_row(device) for device in report.devices],
        right=("memory", "free"),
    )
    print_text()
    _print_extras(report.packages)
    if report.ops:
        print_text()
        print_table(
            ("op", "backend", "dtype", "forward", "backward", "allowed", ""),
            [
                (
                    op.op,
                    op.backend,
                    op.dtype,
                    None if op.forward is None else f"{op.forward:.1e}",
                    None if op.backward is None else f"{op.backward:.1e}",
                    f"{op.tolerance:.0e}",
                    op.status,
                )
                for op in report.ops
            ],
            title=f"Ops on {report.device}: relative error against the reference in fp64",
            right=("forward", "backward", "allowed"),
        )
    print_text()
    for check in report.checks:
        if check.status == "ok":
            print_line(f"{check.name}: {check.said}")


def _device_row(device: DeviceInfo) -> tuple[str | None, ...]:
    from mmmamba_cli.inspection.text_plots import format_bytes

    bf16 = {None: None, True: "yes", False: "no"}[device.bf16]
    memory, free = (None if n is None else format_bytes(n) for n in (device.memory, device.free))
    return device.name, device.description, memory, free, bf16


def _print_extras(packages: tuple[PackageInfo, ...]) -> None:
    from mmmamba_cli.doctor import PURPOSES, missing_extras

    missing = missing_extras(packages)
    rows = []
    for extra, purpose in PURPOSES.items():
        parts = [p for p in packages if p.extra == extra]
        has = ", ".join(f"{p.name} {p.version}" for p in parts if p.version is not None)
        pip = f"pip install 'mmmamba[{extra}]'" if extra in missing else None
        rows.append((extra, purpose, has or None, pip))
    print_table(("extra", "for", "installed", "missing: install with"), rows)
