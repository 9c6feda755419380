"""Checks for required versions, and for known issues of versions and devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mmmamba_cli.doctor.report import FAILED, OK, WARNING, Check, DeviceInfo
from mmmamba_cli.versions import (
    KNOWN_INCOMPATIBILITIES,
    NEWEST_TESTED,
    REQUIREMENTS,
    is_untested,
    satisfies,
)

# This file exists if the NVIDIA driver is loaded, whether or not torch can use it.
DRIVER = "/proc/driver/nvidia/version"


@dataclass(frozen=True)
class SystemFacts:
    """Inputs of the checks.

    versions: of installed libraries only.
    device: the one that the ops are checked on.
    driver: whether the NVIDIA driver is loaded.
    fast_fp32: whether fp32 matmuls use TF32 or bf16.
    """

    versions: Mapping[str, str]
    devices: tuple[DeviceInfo, ...]
    device: str
    driver: bool = False
    fast_fp32: bool = False


def check_versions(facts: SystemFacts) -> Iterator[Check]:
    """One check per required library that is missing, wrong or untested; one check if none is."""
    broken = False
    for name, needs in REQUIREMENTS.items():
        found = facts.versions.get(name)
        if found is None:
            broken = True
            yield Check(name, FAILED, "is not installed", f"pip install '{name}{needs}'")
        elif not satisfies(found, needs):
            broken = True
            yield Check(
                name, FAILED, f"is {found}, needed is {needs}", f"pip install '{name}{needs}'"
            )
        elif is_untested(name, found):
            newest = ".".join(map(str, NEWEST_TESTED[name]))
            yield Check(
                name,
                WARNING,
                f"is {found}, the newest that was tested is {newest}",
                f"where something fails, pip install {name}~={newest}.0",
            )
    if not broken:
        yield Check("versions", OK, f"{len(REQUIREMENTS)} libraries as needed")


def check_known_issues(facts: SystemFacts) -> Iterator[Check]:
    """One check per known issue that applies to this machine."""
    majors = {d.capability[0] for d in facts.devices if d.capability}
    for pair in KNOWN_INCOMPATIBILITIES:
        on_device = pair.capability is None or pair.capability in majors
        if on_device and pair.applies(facts.versions):
            level = FAILED if pair.is_fatal else WARNING
            yield Check(pair.name, level, pair.sentence(facts.versions), pair.remedy)
    on_cpu = next((d for d in facts.devices if d.name == facts.device == "cpu"), None)
    if on_cpu is not None and on_cpu.bf16 is False:
        yield Check(
            "bf16 on this CPU",
            WARNING,
            "is emulated, and slower than fp32",
            "give --dtype fp32, as commands do by themselves where dtype is auto",
        )
    if facts.driver and not any(d.name.startswith("cuda") for d in facts.devices):
        yield Check(
            "CUDA",
            WARNING,
            "an NVIDIA driver is there, but torch finds no GPU",
            "install a build of torch for CUDA, and see whether nvidia-smi works",
        )
    if facts.fast_fp32:
        yield Check(
            "TF32",
            WARNING,
            "is on: fp32 products have 10 bits of mantissa, so fp32 checks may fail",
            "torch.set_float32_matmul_precision('highest') turns it off",
        )
