"""Is this machine fit: versions, devices, every op checked against its reference."""

from mmmamba_cli.doctor.diagnosis import examine
from mmmamba_cli.doctor.environment import PURPOSES, missing_extras
from mmmamba_cli.doctor.report import Check, Device, OpCheck, Package, Report

__all__ = [
    "PURPOSES",
    "Check",
    "Device",
    "OpCheck",
    "Package",
    "Report",
    "examine",
    "missing_extras",
]
