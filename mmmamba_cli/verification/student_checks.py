"""The stock class of a teacher against students of the same weights.

The stock class is loaded once. Students take over its parameters without a copy, so only one model
is in memory until the last check, which loads a student from the teacher's files.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.architecture import mixer_spec, mixer_specs
from mmmamba_cli.teachers import StudentPlan, anatomy_of, convert, mixers_of, student_config
from mmmamba_cli.teachers.auto_class import register_model, turns_heads
from mmmamba_cli.teachers.mixer_plan import ATTENTION_MIXER
from mmmamba_cli.verification.comparison import (
    Rounding,
    check_rounding,
    compare_bits,
    compare_generation,
    greedy_tokens,
    logits_of,
    rounding_of,
)
from mmmamba_cli.verification.in_place_teacher import InPlaceTeacher
from mmmamba_cli.verification.memory import weight_bytes
from mmmamba_cli.verification.prompts import Inputs, Prompts
from mmmamba_cli.verification.report import DIFFERENT, OK, SKIPPED, CheckResult
from mmmamba_cli.verification.steps import Progress, Step, require_loaded, run_step, skipped

STOCK, FROM_FILES = "stock class", "student from the files"
ON_TEXT, ON_PICTURE, ON_PICTURES, ON_BATCH = (
    "logits, text",
    "logits, one picture",
    "logits, two pictures",
    "logits, left-padded batch",
)
GENERATION, STOCK_ROUNDING = "generation", "cache and padding"
MODEL_CHECKS = (STOCK, ON_TEXT, ON_PICTURE, ON_PICTURES, ON_BATCH, GENERATION, STOCK_ROUNDING)
# The layer that is replaced by each mixer: transformers asks it for the length of a cache.
REPLACED_LAYER = 0


@dataclass(frozen=True)
class StockOutputs:
    """What is kept of the stock class: bytes of its weights, logits of the text, its rounding."""

    weights: int
    text_logits: Tensor
    rounding: Rounding | None


def check_models(
    teacher: InPlaceTeacher, prompts: Prompts, progress: Progress
) -> tuple[StockOutputs | None, list[CheckResult]]:
    """The checks with weights, and what is kept of the stock class; None if it does not run."""
    loaded: list[Any] = []

    def load() -> CheckResult:
        model, info = teacher.load(teacher.stock_class, teacher.config)
        loaded.append(model)
        return _check_loading(STOCK, teacher.stock_class.__name__, info)

    found = run_step(Step(STOCK, load), progress)
    require_loaded(found[-1])
    if not loaded:
        return None, [*found, *skipped(MODEL_CHECKS[1:], "the stock class does not load")]
    kept: list[Tensor] = []

    def keep_logits() -> list[CheckResult]:
        kept.append(logits_of(loaded[0], prompts.text).cpu())
        return []

    found += run_step(Step(ON_TEXT, keep_logits), lambda text: None)
    if not kept:
        return None, [*found, *skipped(MODEL_CHECKS[2:], "the stock class does not run")]
    weights = weight_bytes(loaded[0])
    rounding, results = check_students(teacher, loaded[0], prompts, progress)
    # The stock class must be gone before its weights are loaded again.
    loaded.clear()
    gc.collect()
    step = Step(FROM_FILES, lambda: check_from_files(teacher, prompts, kept[0]))
    found += [*results, *run_step(step, progress)]
    return StockOutputs(weights, kept[0], rounding), found


def _check_loading(name: str, loaded_as: str, info: dict[str, Any]) -> CheckResult:
    """What transformers says of the tensors that it loaded."""
    problems = [
        f"{key.removesuffix('_keys')}: {', '.join(sorted(map(str, info[key]))[:5])}"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    ]
    if problems:
        return CheckResult(name, DIFFERENT, f"{loaded_as} loads with {'; '.join(problems)}")
    return CheckResult(name, OK, f"{loaded_as} loads every tensor")


def check_students(
    teacher: InPlaceTeacher, stock: Any, prompts: Prompts, progress: Progress
) -> tuple[Rounding | None, list[CheckResult]]:
    """Students that share the weights of `stock`: attention in all layers, then each mixer.

    Returns the rounding of the stock class too; None if it does not decode.
    """
    found = check_all_attention(teacher, stock, prompts, progress)
    own: list[Rounding] = []

    def stock_rounding() -> CheckResult:
        own.append(rounding_of(stock, prompts, teacher.tokens, teacher.placeholder_ids))
        return _describe_stock_rounding(own[0])

    found += run_step(Step(STOCK_ROUNDING, stock_rounding), progress)
    for mixer in (name for name in mixer_specs() if name != ATTENTION_MIXER):
        name = f"mixer {mixer}"
        if not own:
            found += skipped([name], "the stock class does not decode")
            continue
        check = partial(check_mixer, teacher, stock, mixer, prompts, own[0])
        found += run_step(Step(name, check), progress)
    return (own[0] if own else None), found


def check_all_attention(
    teacher: InPlaceTeacher, stock: Any, prompts: Prompts, progress: Progress
) -> list[CheckResult]:
    """A student of attention in all layers: logits of every prompt, and generation."""

    @cache
    def student() -> Any:
        return convert(stock, StudentPlan.of_layers(teacher.num_layers, []))

    found: list[CheckResult] = []
    for name, inputs in (
        (ON_TEXT, prompts.text),
        (ON_PICTURE, prompts.picture),
        (ON_PICTURES, prompts.pictures),
        (ON_BATCH, prompts.batch),
    ):
        if inputs is not None:

            def compare(name: str = name, inputs: Inputs = inputs) -> CheckResult:
                return compare_bits(name, stock, student(), inputs)

            found += run_step(Step(name, compare), progress)
        elif teacher.takes_pictures:
            found += skipped([name], "there is no processor whose pictures can be used")

    def generate() -> CheckResult:
        inputs, tokens = prompts.richest, teacher.tokens
        return compare_generation(
            GENERATION, stock, student(), inputs, tokens, teacher.placeholder_ids
        )

    return [*found, *run_step(Step(GENERATION, generate), progress)]


def _describe_stock_rounding(own: Rounding) -> CheckResult:
    """How exactly the stock class decodes with a cache and in a batch; never a difference."""
    padded = "" if own.padded is None else f", in a left-padded batch {own.padded:.1e}"
    return CheckResult(
        STOCK_ROUNDING,
        OK,
        f"relative distance of the stock class's logits to its own: with a cache {own.cached:.1e}"
        f"{padded}",
    )


def check_mixer(
    teacher: InPlaceTeacher, stock: Any, mixer: str, prompts: Prompts, own: Rounding
) -> CheckResult:
    """A student with one layer replaced: a cache and a padded batch change nothing."""
    name = f"mixer {mixer}"
    plan = StudentPlan.of_layers(teacher.num_layers, [REPLACED_LAYER], mixer)
    problem = anatomy_of(teacher.config, stock).rope_problem
    if turns_heads(mixer, plan.options) and problem is not None:
        return CheckResult(name, SKIPPED, f"{mixer_spec(mixer).title} turns heads: {problem}")
    student = convert(stock, plan, allow_bidirectional=True)
    replaced = [one.layer_idx for one in mixers_of(student)]
    if replaced != [REPLACED_LAYER]:
        return CheckResult(name, DIFFERENT, f"replaced are layers {replaced}, expected 0")
    # A window longer than the prompt computes the teacher's attention.
    if turns_heads(mixer, plan.options):
        found = rounding_of(student, prompts, teacher.tokens, teacher.placeholder_ids)
        return check_rounding(name, found, own, teacher.dtype)
    _, logits = greedy_tokens(student, prompts.text, 1, teacher.placeholder_ids)
    _, expected = greedy_tokens(stock, prompts.text, 1, teacher.placeholder_ids)
    if torch.equal(logits, expected):
        return CheckResult(name, DIFFERENT, "the logits are the teacher's: the mixer has no effect")
    found = rounding_of(student, prompts, teacher.tokens, teacher.placeholder_ids)
    return check_rounding(name, found, own, teacher.dtype)


def check_from_files(teacher: InPlaceTeacher, prompts: Prompts, expected: Tensor) -> CheckResult:
    """A student of attention in all layers, loaded from the teacher's files as a product is."""
    config = student_config(teacher.config, StudentPlan.of_layers(teacher.num_layers, []))
    model, info = teacher.load(register_model(config.__class__), config)
    loading = _check_loading(FROM_FILES, type(model).__name__, info)
    if loading.status != OK:
        return loading
    logits = logits_of(model, prompts.text).cpu()
    if torch.equal(logits, expected):
        return CheckResult(FROM_FILES, OK, f"{loading.detail}; logits of a text equal, bit for bit")
    largest = float((logits.double() - expected.double()).abs().max())
    return CheckResult(FROM_FILES, DIFFERENT, f"logits of a text differ by {largest:.3g}")
