"""Verification of a teacher by its name: which implementation runs it, and all checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.checkpoint import NATIVE_MODEL_TYPE, hovle, llama_family, load_model, mmmamba_hf
from mmmamba_cli.checkpoint.config_fields import read_json
from mmmamba_cli.checkpoint.model_names import resolve_path
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.runs import pick_placement
from mmmamba_cli.teachers import MODEL_TYPE_PREFIX
from mmmamba_cli.verification import native_model
from mmmamba_cli.verification.in_place_teacher import (
    InPlaceTeacher,
    anatomy_warnings,
    implementation,
    read_config,
    read_generation_config,
)
from mmmamba_cli.verification.in_place_verifier import OUTPUTS, verify_in_place
from mmmamba_cli.verification.native_verifier import NativeTeacher, verify_native
from mmmamba_cli.verification.prompts import Prompts
from mmmamba_cli.verification.report import CheckResult, VerificationReport
from mmmamba_cli.verification.steps import Progress
from mmmamba_cli.verification.student_checks import StockOutputs

DEFAULT_NEW_TOKENS = 8
AUTO = "auto"
# HolisticVLM alone runs these; transformers has no class for them.
NATIVE_TYPES = (hovle.MODEL_TYPE, mmmamba_hf.MODEL_TYPE, NATIVE_MODEL_TYPE, "internlm2")


def verify_teacher(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = AUTO,
    tokens: int = DEFAULT_NEW_TOKENS,
    progress: Progress = lambda text: None,
) -> VerificationReport:
    """Check a teacher's files, its tokenizer, and students of its weights before any training.

    A teacher of transformers is compared with its stock class. HoVLE has none: HolisticVLM is
    compared with itself, and with golden values where the folder has them.

    Args:
        name: a path, a shipped model or a Hub id.
        device: as in `ResolvedModel.load`.
        dtype: likewise, but "auto" is fp32 for what HolisticVLM alone runs: rounding then hides
            less, since there are no bits to compare.
        tokens: number of tokens that are generated.
        progress: called with the name of each check before it runs.

    Raises:
        CheckpointError: there is no such teacher, its config or weights cannot be read, or it is a
            student.
        DataError: `tokens` is below 1.
        MmmambaError: the device is not there.
    """
    if tokens < 1:
        raise DataError(f"--tokens is {tokens}, expected at least 1")
    chosen, kind = pick_placement(device, dtype)
    path = resolve_path(name)
    model_type = _model_type(path)
    is_native = model_type is None or model_type in NATIVE_TYPES
    if is_native and dtype == AUTO:
        kind = torch.float32
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
    facts: dict[str, Any] = {
        "teacher": str(name),
        "path": str(path),
        "device": str(chosen),
        "dtype": str(kind).removeprefix("torch."),
    }
    if is_native or model_type is None:
        checks = verify_native(NativeTeacher(path, chosen, kind, tokens), progress)
        return VerificationReport(
            **facts,
            model_type=model_type or "unknown",
            compared_with=_golden(path),
            checks=tuple(checks),
        )
    config, settings = read_config(path, model_type), read_generation_config(path)
    teacher = InPlaceTeacher(path, config, settings, chosen, kind, tokens)

    def check_native(prompts: Prompts, outputs: StockOutputs) -> CheckResult:
        model = load_model(path, device=chosen, dtype=kind, frozen=True)
        own = 0.0 if outputs.rounding is None else outputs.rounding.largest
        return native_model.compare_logits(
            OUTPUTS, model, prompts.text, outputs.text_logits, "the stock class", own
        )

    native = check_native if model_type in llama_family.MODEL_TYPES else None
    return VerificationReport(
        **facts,
        model_type=model_type,
        compared_with=implementation(teacher),
        checks=tuple(verify_in_place(teacher, progress, native)),
        warnings=anatomy_warnings(config),
    )


def _model_type(path: Path) -> str | None:
    """The model_type of a folder's config.json; None for a file or a folder without one.

    Raises:
        CheckpointError: config.json cannot be read, or is that of a student or of code that
            transformers does not have.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        raw = read_json(file)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise CheckpointError(f"{file} has no model_type, expected that of a model")
    if model_type.startswith(MODEL_TYPE_PREFIX):
        raise CheckpointError(
            f"{path} is a student of {model_type.removeprefix(MODEL_TYPE_PREFIX)}, not a teacher",
            "verify the teacher that it was made from",
        )
    if model_type == hovle.MODEL_TYPE and "vision_config" in raw:
        raise CheckpointError(
            f"{path} is an InternVL in the form that needs code of its own",
            "take the checkpoint in the form of transformers, whose name ends with -hf",
        )
    return model_type


def _golden(path: Path) -> str | None:
    """The reference that a folder has values of; None if it has none."""
    return native_model.GOLDEN_FILE if (path / native_model.GOLDEN_FILE).is_file() else None
