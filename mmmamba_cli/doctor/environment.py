"""Installed libraries, devices and memory. Importing this module does not import torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

from mmmamba_cli.doctor.report import DeviceInfo, PackageInfo
from mmmamba_cli.versions import REQUIREMENTS, installed_version

EXTRAS = {
    "cuda": ("triton", "fla-core", "einops"),
    "mamba-ssm": ("mamba-ssm",),
    "eval": ("lm-eval", "openpyxl"),
    "tracking": ("tensorboard", "matplotlib"),
    "gguf": ("gguf", "accelerate"),
    "lora": ("peft",),
    "scenes": ("resvg-py", "scikit-learn"),
    "tables": ("pyarrow",),
}
PURPOSES = {
    "cuda": "Triton kernels",
    "mamba-ssm": "another backend of the scan",
    "eval": "text tasks, predictions in spreadsheets",
    "tracking": "training curves",
    "gguf": "teachers from GGUF files",
    "lora": "low-rank adapters in stage 3",
    "scenes": "drawings in SVG",
    "tables": "training data in Parquet files",
}
CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def packages() -> tuple[PackageInfo, ...]:
    """Python, the required libraries and those of extras, installed or not."""
    found = [PackageInfo("python", platform.python_version(), ">=3.11")]
    found += [
        PackageInfo(name, installed_version(name), needs) for name, needs in REQUIREMENTS.items()
    ]
    found += [
        PackageInfo(name, installed_version(name), extra=extra)
        for extra, names in EXTRAS.items()
        for name in names
    ]
    return tuple(found)


def missing_extras(found: tuple[PackageInfo, ...]) -> dict[str, tuple[str, ...]]:
    """{extra: names of its libraries that are not installed}, without complete extras."""
    missing: dict[str, tuple[str, ...]] = {}
    for package in found:
        if package.extra is not None and package.version is None:
            missing[package.extra] = (*missing.get(package.extra, ()), package.name)
    return missing


def devices() -> tuple[DeviceInfo, ...]:
    """The CPU, then the GPUs that torch can use. Propagates errors of importing torch."""
    import torch

    found = [cpu()]
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        found.append(
            DeviceInfo(
                f"cuda:{index}",
                str(torch.cuda.get_device_name(index)),
                memory,
                free,
                torch.cuda.get_device_capability(index),
                torch.cuda.is_bf16_supported(including_emulation=False),
            )
        )
    if torch.backends.mps.is_available():
        found.append(DeviceInfo("mps", platform.machine()))
    return tuple(found)


def cpu() -> DeviceInfo:
    """The CPU as the operating system describes it."""
    lines = _name_values(CPUINFO)
    # x86 lists "flags", Arm lists "Features".
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    described = lines.get("model name") or platform.processor() or platform.machine()
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _name_values(MEMINFO).get("MemAvailable", "").split()
    return DeviceInfo(
        "cpu",
        f"{described}, {cores()} cores",
        memory,
        1024 * int(free[0]) if free else None,
        bf16=bool(flags & BF16_FLAGS) if flags else None,
    )


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _name_values(file: Path) -> Mapping[str, str]:
    """The `name : value` lines of a file, the first of each name; {} if it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found
