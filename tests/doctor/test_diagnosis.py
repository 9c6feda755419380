"""The diagnosis: versions, known issues, libraries and ops."""

from __future__ import annotations

import math
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmamba_cli import ops
from mmmamba_cli.doctor import (
    diagnosis,
    environment,
    library_checks,
    missing_extras,
    op_checks,
    teacher_check,
)
from mmmamba_cli.doctor.environment import EXTRAS, PURPOSES
from mmmamba_cli.doctor.known_issues import SystemFacts, check_known_issues, check_versions
from mmmamba_cli.doctor.op_cases import op_specs
from mmmamba_cli.doctor.op_checks import check_backend, check_ops, largest_error, relative_error
from mmmamba_cli.doctor.op_spec import OpSpec
from mmmamba_cli.doctor.report import Check, DeviceInfo, DoctorReport, OpCheck, PackageInfo
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.ops.norm import reference
from mmmamba_cli.versions import REQUIREMENTS, release_numbers, satisfies

CPU = torch.device("cpu")
FP32 = (torch.float32,)
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
GOOD = {name: bound or "1" for name, bound in REQUIREMENTS.items()} | {
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
}
GOOD = {name: re.sub(r"^>=", "", version).partition(",")[0] for name, version in GOOD.items()}


def op(name: str) -> OpSpec:
    return next(found for found in op_specs() if found.name == name)


def test_requirements_equal_those_of_pyproject() -> None:
    def cut(text: str) -> tuple[str, str]:
        match = re.match(r"([\w-]+)(.*)", text.partition(";")[0].strip())
        assert match is not None
        return match[1], match[2]

    assert dict(map(cut, PROJECT["dependencies"])) == REQUIREMENTS
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k != "dev"}
    assert {k: tuple(cut(name)[0] for name in v) for k, v in extras.items()} == EXTRAS
    assert set(PURPOSES) == set(EXTRAS)


def test_every_public_op_has_backends_and_cases() -> None:
    functions = {name for name in ops.__all__ if name != "BACKENDS"}
    assert set(ops.BACKENDS) == functions
    for found in op_specs():
        assert found.cases, found.name
        assert found.reference in found.backends
    lengths = {int(c.name.split()[0]) for c in op("ssd").cases if c.name.endswith("tokens")}
    assert lengths == {1, 37, 131}
    assert {"mask", "seq_idx"} <= {case.name for case in op("ssd").cases}


def test_library_backends_are_optional_and_known_to_be_forward_only() -> None:
    assert op("ssd").optional == {"mamba_ssm", "fla"}
    for name in ("ssd", "delta_rule", "gla"):
        assert op(name).forward_only == {"fla"} <= op(name).optional
    assert not op("attention").optional


def test_all_ops_pass_on_the_cpu_in_both_dtypes() -> None:
    every = list(check_ops(CPU, (torch.float32, torch.bfloat16)))
    # Kernels may be installed without a GPU, and are skipped on the CPU beside one.
    kernels = {"triton", "products", "flash", "efficient", "mamba_ssm", "fla"}
    assert all(check.status == "skipped" for check in every if check.backend in kernels)
    found = [check for check in every if check.backend not in kernels]
    assert all(check.status == "ok" for check in found), [c.sentence for c in found]
    choosing = [c for c in found if c.op == "greedy_argmax"]
    found = [c for c in found if c.op != "greedy_argmax"]
    assert [(c.forward, c.backward) for c in choosing] == [(0.0, 0.0)] * 2
    assert all(c.backward is not None and c.forward is not None for c in found)
    backends = {(c.op, c.backend) for c in every}
    registered = {(name, b) for name, table in ops.BACKENDS.items() for b in table}
    assert backends == registered
    # Rounding errors of bf16 are visible: it has 8 bits. Mixing matrices are fp32.
    rounded = [c for c in found if c.dtype == "bfloat16" and not c.op.endswith("_matrix")]
    assert all(c.forward and c.forward > 1e-4 for c in rounded)


def test_backends_registered_later_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slightly_off(y: torch.Tensor, *rest: Any) -> torch.Tensor:
        return reference.gated_norm(y, *rest) * 1.001

    monkeypatch.setitem(ops.BACKENDS["gated_rms_norm"], "fused", slightly_off)  # type: ignore[arg-type]
    found = {c.backend: c for c in check_ops(CPU, FP32, [op("gated_rms_norm")])}
    assert (found["reference"].status, found["fused"].status) == ("ok", "failed")
    assert found["fused"].forward == pytest.approx(1e-3, rel=0.01)
    assert found["fused"].sentence.startswith("gated_rms_norm, fused, float32: forward error 0.001")


def test_progress_before_slow_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(op: Any, backend: str, device: torch.device, dtype: torch.dtype) -> OpCheck:
        return OpCheck(op.name, backend, str(dtype), "ok", 0.0, 0.0, 1.0, 1)

    monkeypatch.setattr(op_checks, "check_backend", unchecked)
    slow = replace(op("ssd"), backends={"chunked": print, "fla": print}, optional={"fla"})
    for device, told in (("cuda", ["checking ssd by fla, which may"]), ("cpu", [])):
        said: list[str] = []
        assert len(list(check_ops(torch.device(device), FP32, [slow], said.append))) == 2
        assert [text.partition(" tune")[0] for text in said] == told


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 1.01 * gradient


def broken(kind: str) -> Any:
    def backend(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if kind == "gradient":
            return reference.norm(_WrongGradient.apply(x), weight, eps)
        if kind == "no gradient":
            return reference.norm(x.detach(), weight.detach(), eps)
        if kind == "nan":
            return reference.norm(x, weight, eps) * math.nan
        if kind == "raises":
            raise RuntimeError("no kernel image\nis available")
        if kind == "refuses long" and x.shape[1] > 100:
            raise NotImplementedError("at most 100 tokens")
        if kind == "refuses":
            raise MmmambaError("never")
        return reference.norm(x, weight, eps)

    return backend


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("gradient", "failed", "backward error 0.01"),
        ("no gradient", "failed", "has no gradients"),
        ("nan", "failed", "forward error nan"),
        ("raises", "failed", "1 tokens: RuntimeError: no kernel image"),
        ("refuses long", "ok", ""),
        ("refuses", "skipped", "refuses 131 tokens: never"),
    ],
)
def test_wrong_kernels_are_reported(
    monkeypatch: pytest.MonkeyPatch, kind: str, status: str, said: str
) -> None:
    monkeypatch.setitem(ops.BACKENDS["rms_norm"], "fused", broken(kind))  # type: ignore[index]
    found = check_backend(op("rms_norm"), "fused", CPU, torch.float32)
    assert (found.status, said in found.sentence) == (status, True), found.sentence
    assert found.cases == {"ok": 2, "failed": 0 if kind == "raises" else 3, "skipped": 0}[status]


def test_an_op_without_a_case_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.BACKENDS, "new_op", {"reference": reference.norm})
    (found,) = (c for c in check_ops(CPU, FP32, [op("new_op")]))
    assert (found.status, found.said) == ("failed", "the doctor has no case")


def test_wrong_attention_mask_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    table: Any = ops.BACKENDS["attention"]
    right = table["sdpa"]

    def blind(*inputs: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """Attends to padding."""
        mask = None if mask is None else torch.ones_like(mask).tril()
        return right(*inputs, mask=mask, **options)

    monkeypatch.setitem(table, "sdpa", blind)
    found = {check.backend: check for check in check_ops(CPU, FP32, [op("attention")])}
    assert (found["sdpa"].status, found["sdpa"].cases) == ("failed", 6)
    assert found["reference"].status == "ok"


def test_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(check_ops(CPU, FP32, [op("rms_norm")]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_relative_errors() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_error(torch.tensor([2.0]), torch.tensor([0.0])) == 2
    assert math.isnan(largest_error([0.1, math.nan]))


def test_release_numbers_and_requirements() -> None:
    assert release_numbers("2.13.0+cpu") == (2, 13, 0)
    assert release_numbers("3.7.0.post1") == (3, 7, 0)
    assert satisfies("5.17.0", ">=5.17,<6")
    assert not satisfies("5.9.1", ">=5.17,<6")
    assert not satisfies("6.0", ">=5.17,<6")
    assert satisfies("anything", "")


def facts(device: DeviceInfo, device_name: str = "cpu", **versions: str) -> SystemFacts:
    return SystemFacts(
        {**GOOD, **versions}, (DeviceInfo("cpu", "a CPU", bf16=True), device), device_name
    )


H100 = DeviceInfo("cuda:0", "H100", capability=(9, 0), bf16=True)
A100 = DeviceInfo("cuda:0", "A100", capability=(8, 0), bf16=True)
CASES: list[tuple[DeviceInfo, dict[str, str], bool]] = [
    (H100, {"fla-core": "0.4", "triton": "3.4.0"}, True),
    (H100, {"fla-core": "0.4", "triton": "3.7.0"}, True),
    (H100, {"flash-linear-attention": "0.4", "triton": "3.6.0"}, True),
    (H100, {"fla-core": "0.4", "triton": "3.7.1"}, False),
    (H100, {"fla-core": "0.4", "triton": "3.3.1"}, False),
    (H100, {"triton": "3.6.0"}, False),
    (A100, {"fla-core": "0.4", "triton": "3.6.0"}, False),
]


@pytest.mark.parametrize(("device", "versions", "bad"), CASES)
def test_known_issue_of_fla_on_hopper(
    device: DeviceInfo, versions: dict[str, str], bad: bool
) -> None:
    found = [check.sentence for check in check_known_issues(facts(device, "cuda:0", **versions))]
    assert bool(found) == bad
    assert all("gated backward on Hopper with Triton" in sentence for sentence in found)


def test_other_known_issues() -> None:
    slow = DeviceInfo("cpu", "an old CPU", bf16=False)
    on_cpu = check_known_issues(SystemFacts(GOOD, (slow,), "cpu"))
    assert [check.name for check in on_cpu] == ["bf16 on this CPU"]
    assert not list(check_known_issues(SystemFacts(GOOD, (slow, A100), "cuda:0", driver=True)))
    (no_cuda,) = check_known_issues(
        SystemFacts(GOOD, (DeviceInfo("cpu", "a CPU"),), "cpu", driver=True)
    )
    assert "torch finds no GPU" in no_cuda.sentence
    (tf32,) = check_known_issues(SystemFacts(GOOD, (A100,), "cuda:0", fast_fp32=True))
    assert tf32.name == "TF32"


def test_old_versions_fail_with_the_pip_command() -> None:
    (good,) = check_versions(SystemFacts(GOOD, (), "cpu"))
    assert good.status == "ok"
    old = SystemFacts({**GOOD, "transformers": "5.16.2", "torch": "2.8.1"}, (), "cpu")
    assert [check.sentence for check in check_versions(old)] == [
        "torch: is 2.8.1, needed is >=2.9 (pip install 'torch>=2.9')",
        "transformers: is 5.16.2, needed is >=5.17,<6 (pip install 'transformers>=5.17,<6')",
    ]
    without = {name: version for name, version in GOOD.items() if name != "pillow"}
    (missing,) = check_versions(SystemFacts(without, (), "cpu"))
    assert (missing.name, missing.status, missing.said) == ("pillow", "failed", "is not installed")


def test_missing_extras() -> None:
    packages = (
        PackageInfo("a", "1", extra="x"),
        PackageInfo("b", None, extra="x"),
        PackageInfo("c", None),
    )
    assert missing_extras(packages) == {"x": ("b",)}


def test_cpu_from_proc_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, memory = tmp_path / "cpuinfo", tmp_path / "meminfo"
    info.write_text("model name\t: Old One\nflags\t: fpu avx512f\n\nmodel name\t: Second\n")
    memory.write_text("MemTotal: 8 kB\nMemAvailable:    4 kB\n")
    monkeypatch.setattr(environment, "CPUINFO", info)
    monkeypatch.setattr(environment, "MEMINFO", memory)
    found = environment.cpu()
    assert found.description.startswith("Old One, ")
    assert (found.free, found.bf16) == (4096, False)
    info.write_text("model name\t: New One\nflags\t: fpu amx_bf16\n")
    assert environment.cpu().bf16 is True
    info.unlink()
    memory.unlink()
    found = environment.cpu()
    assert (found.free, found.bf16) == (None, None)


def test_library_checks_pass() -> None:
    assert library_checks.check_tokenizer().status == "ok"
    assert library_checks.check_resizing().status == "ok"


def test_tokenizer_that_changes_texts_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import sentencepiece

    right = sentencepiece.SentencePieceProcessor.decode
    monkeypatch.setattr(
        sentencepiece.SentencePieceProcessor, "decode", lambda self, ids: right(self, ids).strip()
    )
    found = library_checks.check_tokenizer()
    assert found.status == "failed"
    assert found.said == "'  two  spaces' comes back as 'two  spaces'"


def test_other_pixels_are_a_warning_and_varying_pixels_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_checks, "_resized_digest", lambda: "other")
    assert library_checks.check_resizing().status == "warning"
    digests = iter("ab")
    monkeypatch.setattr(library_checks, "_resized_digest", lambda: next(digests))
    assert library_checks.check_resizing().status == "failed"


def test_broken_installation_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = diagnosis.diagnose()
    assert [s for s in report.failures if s.startswith("transformers: cannot be imported")]
    assert report.ops == ()


def test_missing_device_is_a_user_error() -> None:
    with pytest.raises(MmmambaError, match="abacus"):
        diagnosis.diagnose("abacus")


def test_failures_and_warnings_of_a_report() -> None:
    report = DoctorReport(
        (),
        (),
        "cpu",
        (Check("a", "ok", "x"), Check("b", "failed", "y", "mend"), Check("c", "warning", "z")),
        (
            OpCheck("o", "p", "q", "failed", 1.0, None, 0.5, 1),
            OpCheck("o", "p", "q", "ok", 0, 0, 1, 1),
        ),
    )
    assert list(report.failures) == ["b: y (mend)", "o, p, q: forward error 1, allowed is 0.5"]
    assert list(report.warnings) == ["c: z"]


def test_a_student_of_a_transformers_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_check, "find_spec", lambda name: None)
    found = teacher_check.check_teachers()
    assert found.status == "ok" and "pip install torchvision num2words" in found.said
    monkeypatch.setattr(teacher_check, "find_spec", lambda name: name)
    assert "pip install" not in teacher_check.check_teachers().said
    for error in (1.0, float("nan")):
        monkeypatch.setattr(teacher_check, "decoding_error", lambda error=error: error)
        found = teacher_check.check_teachers()
        assert found.status == "failed" and "differs by" in found.said
