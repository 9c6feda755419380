"""Verification of a teacher of transformers: files and processor first, then its models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmmamba_cli.architecture import LINEAR, default_mixer
from mmmamba_cli.checkpoint import open_source
from mmmamba_cli.teachers import StudentPlan, expected_tensors, text_config
from mmmamba_cli.verification import processor_checks
from mmmamba_cli.verification.in_place_teacher import ANATOMY, InPlaceTeacher, check_anatomy
from mmmamba_cli.verification.memory import MEMORY, check_memory
from mmmamba_cli.verification.processor_parts import ProcessorParts, open_processor_parts
from mmmamba_cli.verification.prompts import Prompts, encoded_prompts, random_prompts
from mmmamba_cli.verification.report import DIFFERENT, OK, SKIPPED, CheckResult
from mmmamba_cli.verification.steps import Progress, Step, run_step, skipped
from mmmamba_cli.verification.stored_tensors import (
    TENSORS,
    VALUES,
    check_stored_tensors,
    check_values,
)
from mmmamba_cli.verification.student_checks import MODEL_CHECKS, StockOutputs, check_models

OUTPUTS = "HolisticVLM"
NativeCheck = Callable[[Prompts, StockOutputs], CheckResult]


def verify_in_place(
    teacher: InPlaceTeacher, progress: Progress, native: NativeCheck | None = None
) -> list[CheckResult]:
    """All checks of a teacher of transformers, those without weights first.

    `native` is one more check with the outputs of the stock class, of a language model that
    HolisticVLM runs too.

    Raises:
        CheckpointError: the weights are missing, incomplete or damaged.
    """
    with open_source(teacher.folder) as source:
        found = run_step(
            Step(TENSORS, lambda: check_stored_tensors(source, teacher.config)), progress
        )
        found += run_step(Step(ANATOMY, lambda: check_anatomy(teacher.config)), progress)
        complete = all(one.status == OK for one in found)
        found += run_step(Step(VALUES, lambda: check_values(source)), progress)
        opened = open_processor_parts(teacher.folder, teacher.takes_pictures)
        found += check_encoding(teacher, opened, progress)
        if not complete:
            reason = "the checks of tensors and anatomy come first"
            return [*found, *skipped(MODEL_CHECKS, reason)]
        prompts = make_prompts(teacher, opened, found)
        outputs, results = check_models(teacher, prompts, progress)
        found += results
        if outputs is not None and native is not None:
            found += run_step(Step(OUTPUTS, lambda: native(prompts, outputs)), progress)
        if outputs is not None:
            step = Step(MEMORY, lambda: _check_memory(teacher, source, outputs.weights))
            found += run_step(step, progress)
    return found


def check_encoding(
    teacher: InPlaceTeacher, opened: ProcessorParts, progress: Progress
) -> list[CheckResult]:
    """The checks of tokenizer, chat template and processor, or why they are skipped."""
    checks = (
        processor_checks.TOKENIZER,
        processor_checks.SPECIAL_TOKENS,
        processor_checks.TEMPLATE,
    )
    status = DIFFERENT if opened.is_damaged else SKIPPED
    if opened.tokenizer is None:
        problem = str(opened.tokenizer_problem)
        names = processor_checks.PROCESSOR_CHECKS if teacher.takes_pictures else ()
        rest = skipped((*checks[1:], *names), "there is no tokenizer")
        return [CheckResult(checks[0], status, problem), *rest]
    config, settings, tokenizer = teacher.config, teacher.generation_config, opened.tokenizer
    runs: tuple[Callable[[], CheckResult], ...] = (
        lambda: processor_checks.check_tokenizer(tokenizer, teacher.vocab_size),
        lambda: processor_checks.check_special_tokens(tokenizer, config, settings),
        lambda: processor_checks.check_chat_template(opened, config, settings),
    )
    found = [
        result
        for name, run in zip(checks, runs, strict=True)
        for result in run_step(Step(name, run), progress)
    ]
    if not teacher.takes_pictures:
        return found
    first, *others = processor_checks.PROCESSOR_CHECKS
    if opened.processor is None:
        problem = str(opened.processor_problem)
        return [*found, CheckResult(first, status, problem), *skipped(others, problem)]
    encode = opened.encoder(use_template=found[-1].status == OK)
    step = Step(first, lambda: processor_checks.check_processor(encode, config))
    return [*found, *run_step(step, progress)]


def make_prompts(
    teacher: InPlaceTeacher, opened: ProcessorParts, found: Sequence[CheckResult]
) -> Prompts:
    """Prompts by the parts that their checks found right; random ids without a tokenizer."""
    fine = {one.name for one in found if one.status == OK}
    if opened.tokenizer is None or processor_checks.TOKENIZER not in fine:
        pad_id = getattr(text_config(teacher.config), "pad_token_id", None)
        return random_prompts(teacher.vocab_size, teacher.special_ids, pad_id)
    encode = opened.encoder(use_template=processor_checks.TEMPLATE in fine)
    has_pictures = fine.issuperset(processor_checks.PROCESSOR_CHECKS)
    return encoded_prompts(encode, has_pictures, "the teacher's own tokenizer or processor")


def _check_memory(teacher: InPlaceTeacher, source: Any, weights: int) -> list[CheckResult]:
    plan = StudentPlan.of_layers(teacher.num_layers, None, default_mixer(LINEAR))
    tensors = expected_tensors(teacher.config, plan, allow_bidirectional=True)
    shapes = {name: one.shape for name, one in tensors.items()}
    new = {name: one.shape for name, one in tensors.items() if one.mixer is not None}
    return check_memory(source, weights, teacher.device, shapes, new)
