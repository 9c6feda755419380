"""`mmmamba doctor`: table, JSON and exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from ended import Command, Done

from mmmamba_cli import ops
from mmmamba_cli.doctor import diagnosis, op_checks
from mmmamba_cli.doctor.report import Check
from mmmamba_cli.ops.norm import reference

Doctor = Callable[..., Done]
# Packages that may be installed on a machine without a GPU.
KERNELS = {"triton", "products", "flash", "efficient", "mamba_ssm", "fla"}


@pytest.fixture
def doctor(mmmamba: Command) -> Doctor:
    return lambda *words: mmmamba("doctor", *words)


@pytest.fixture
def only_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """One op and a kernel that is skipped, where the checks of the others are not the point."""
    few = [op for op in op_checks.op_specs() if op.name in ("rms_norm", "gated_rms_norm")]
    monkeypatch.setattr(op_checks, "op_specs", lambda: few)


def test_a_fit_machine(doctor: Doctor) -> None:
    done = doctor("--device", "cpu")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "fit: everything that is needed works, on cpu"
    rows = [line.split() for line in done.out.splitlines()]
    for op, backends in ops.BACKENDS.items():
        for backend in backends:
            for dtype in ("float32", "bfloat16"):
                (row,) = [r for r in rows if r[:3] == [op, backend, dtype]]
                assert "skipped" in row if backend in KERNELS else row[-1] == "ok"
    # The version of the installed package; torch.__version__ may add a build such as +cu130.
    assert ["torch", version("torch"), ">=2.9"] in rows


def off(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return reference.norm(x, weight, eps) * 2


@pytest.mark.usefixtures("only_norms")
def test_a_wrong_kernel_is_an_error_and_exit_2(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops.BACKENDS["rms_norm"], "fused", off)  # type: ignore[index]
    done = doctor("--device", "cpu")
    assert done.code == 2
    assert "error: rms_norm, fused, float32: forward error 1, " in done.err
    assert "fit: " not in done.out
    found: dict[str, Any] = json.loads(doctor("--device", "cpu", "--json").out)
    assert found["fit"] is False
    assert len(found["failures"]) == 2


@pytest.mark.usefixtures("only_norms")
def test_json_output(doctor: Doctor) -> None:
    done = doctor("--device", "cpu", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert (found["fit"], found["failures"], found["device"]) == (True, [], "cpu")
    kernels = {op["status"] for op in found["ops"] if op["backend"] in KERNELS}
    assert kernels <= {"skipped"}
    assert {op["status"] for op in found["ops"] if op["backend"] not in KERNELS} == {"ok"}
    assert found["devices"][0]["name"] == "cpu"
    assert {p["name"] for p in found["packages"]} >= {"python", "torch", "triton", "lm-eval"}


def test_a_warning_does_not_make_a_machine_unfit(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "check_resizing", lambda: Check("pillow", "warning", "is odd"))
    monkeypatch.setattr(diagnosis, "_check_ops", lambda device, progress: ())
    done = doctor("--device", "cpu")
    assert done.code == 0
    assert "warning: pillow: is odd" in done.err


@pytest.mark.usefixtures("only_norms")
def test_json_output_of_nan(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        ops.BACKENDS["rms_norm"],  # type: ignore[arg-type]
        "fused",
        lambda x, weight, eps: off(x, weight, eps) * float("nan"),
    )
    done = doctor("--device", "cpu", "--json")
    assert done.code == 2
    fused = [op for op in json.loads(done.out)["ops"] if op["backend"] == "fused"]
    assert [op["forward"] for op in fused] == ["nan", "nan"]


def test_an_unknown_device_is_a_user_error(doctor: Doctor) -> None:
    done = doctor("--device", "abacus")
    assert (done.code, done.out) == (2, "")
    assert "error: device 'abacus' is not known" in done.err
