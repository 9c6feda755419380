"""The diagnosis of `mmmamba doctor`: versions, devices, and every op against its reference."""

from mmmamba_cli.doctor.diagnosis import diagnose
from mmmamba_cli.doctor.environment import PURPOSES, missing_extras
from mmmamba_cli.doctor.report import Check, DeviceInfo, DoctorReport, OpCheck, PackageInfo

# The former name, kept for one release.
examine = diagnose

__all__ = [
    "PURPOSES",
    "Check",
    "DeviceInfo",
    "DoctorReport",
    "OpCheck",
    "PackageInfo",
    "diagnose",
    "examine",
    "missing_extras",
]
