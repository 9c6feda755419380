"""Verification of a teacher that HolisticVLM alone runs: HoVLE, GGUF files, InternLM2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.architecture import LINEAR
from mmmamba_cli.checkpoint import Checkpoint, load_model, open_checkpoint
from mmmamba_cli.devices import require_memory
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing import HolisticTextProcessor, as_id_set, count_tiles
from mmmamba_cli.runs import open_processor
from mmmamba_cli.verification import native_model, processor_checks
from mmmamba_cli.verification.comparison import check_rounding, rounding_of
from mmmamba_cli.verification.memory import MEMORY, check_memory, weight_bytes
from mmmamba_cli.verification.prompts import (
    QUESTION,
    Prompts,
    drawn_picture,
    encoded_prompts,
    holistic_encoder,
    random_prompts,
)
from mmmamba_cli.verification.report import DIFFERENT, OK, SKIPPED, CheckResult
from mmmamba_cli.verification.steps import Progress, Step, require_loaded, run_step, skipped
from mmmamba_cli.verification.stored_tensors import (
    VALUES,
    check_values,
    describe_source,
    num_elements,
)

TENSORS, LOADING, TILING, SELF = "config and tensors", "loading", "tiling", "cache and padding"
TEMPLATE = "chat template"


@dataclass(frozen=True)
class NativeTeacher:
    """A checkpoint that HolisticVLM loads, and where and how it runs."""

    path: Path
    device: torch.device
    dtype: torch.dtype
    tokens: int


def verify_native(teacher: NativeTeacher, progress: Progress) -> list[CheckResult]:
    """All checks of a teacher of our own model class, those without weights first.

    Raises:
        CheckpointError: it is a student, not a teacher.
    """
    opened: list[Checkpoint] = []

    def open_it() -> CheckResult:
        opened.append(open_checkpoint(teacher.path))
        assumed = ", ".join(opened[0].assumed)
        note = f"; assumed, since there is no config: {assumed}" if assumed else ""
        return CheckResult(TENSORS, OK, f"{describe_source(opened[0].source)}{note}")

    found = run_step(Step(TENSORS, open_it), progress)
    if not opened:
        return [*found, *skipped((VALUES, LOADING), "the checkpoint cannot be opened")]
    checkpoint = opened[0]
    if LINEAR in checkpoint.architecture.layer_types:
        raise CheckpointError(
            f"{teacher.path} is not a teacher: some of its layers are linear already",
            "verify the teacher that it was made from",
        )
    found += run_step(Step(VALUES, lambda: check_values(checkpoint.source)), progress)
    processor, results = check_processor(checkpoint, progress)
    found += results
    return [
        *found,
        *check_model(teacher, checkpoint, make_prompts(checkpoint, processor), progress),
    ]


def check_processor(checkpoint: Checkpoint, progress: Progress) -> tuple[Any, list[CheckResult]]:
    """The processor, None without one, and the checks of tokenizer, template and tiling."""
    names = (processor_checks.TOKENIZER, TEMPLATE, TILING)
    try:
        processor = open_processor(checkpoint)
    except CheckpointError as error:
        rest = skipped(names[1:], "the tokenizer cannot be opened")
        return None, [CheckResult(names[0], DIFFERENT, str(error)), *rest]
    if processor is None:
        return None, skipped(names, f"there is no tokenizer beside {checkpoint.path}")
    runs: list[tuple[str, Callable[[], CheckResult | list[CheckResult]]]] = [
        (
            names[0],
            lambda: processor_checks.check_tokenizer(
                processor.tokenizer, checkpoint.config.vocab_size
            ),
        ),
        (TEMPLATE, lambda: check_template(processor, checkpoint)),
    ]
    if not isinstance(processor, HolisticTextProcessor):
        runs.append((TILING, lambda: check_tiling(processor)))
    return processor, [one for name, run in runs for one in run_step(Step(name, run), progress)]


def check_template(processor: Any, checkpoint: Checkpoint) -> CheckResult:
    """A question renders to the control tokens of the template, and answers end with a stop id."""
    tokenizer = processor.tokenizer
    if isinstance(processor, HolisticTextProcessor) and tokenizer.chat_template is None:
        return CheckResult(TEMPLATE, SKIPPED, "there is no chat template")
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": processor_checks.ANSWER},
    ]
    ids, is_answer = processor.conversation_ids(messages)
    answer = [index for index, marked in zip(ids, is_answer, strict=True) if marked]
    written = tokenizer.decode(answer[:-1]).strip()
    if QUESTION not in tokenizer.decode(ids) or written != processor_checks.ANSWER:
        return CheckResult(TEMPLATE, DIFFERENT, f"the answer is rendered as {written!r}")
    stops = {*processor.stop_token_ids, *as_id_set(checkpoint.config.eos_token_id)}
    end = tokenizer.convert_ids_to_tokens(answer[-1])
    if answer[-1] not in stops:
        return CheckResult(
            TEMPLATE, DIFFERENT, f"an answer ends with {end}, which is no stop token"
        )
    return CheckResult(TEMPLATE, OK, f"a turn is {len(ids)} tokens; an answer ends with {end}")


def check_tiling(processor: Any) -> CheckResult:
    """A picture is as many tiles as its size gives, and each tile as many context ids."""
    sizes, parts = [(0, 0), (1, 1)], []
    for first, last in sizes:
        pictures = [drawn_picture(index) for index in range(first, last + 1)]
        tiling = processor.image_processor.tiling
        tiles = sum(count_tiles(*picture.size, tiling) for picture in pictures)
        inputs = processor.chat(QUESTION, pictures)
        context = int((inputs["input_ids"] == processor.image_token_id).sum())
        found = len(inputs["pixel_values"])
        if found != tiles or context != tiles * processor.tokens_per_tile:
            return CheckResult(
                TILING,
                DIFFERENT,
                f"{found} tiles and {context} context ids, expected {tiles} tiles of "
                f"{processor.tokens_per_tile}",
            )
        parts.append(f"{pictures[0].width} x {pictures[0].height}: {tiles}")
    per_tile = processor.tokens_per_tile
    return CheckResult(TILING, OK, f"tiles of {'; '.join(parts)}; {per_tile} ids a tile")


def make_prompts(checkpoint: Checkpoint, processor: Any) -> Prompts:
    """Prompts by the processor; random ids without one."""
    config: Any = checkpoint.config
    if processor is None:
        avoided = {*as_id_set(config.eos_token_id), *_placeholders(config)}
        return random_prompts(config.vocab_size, sorted(avoided), config.pad_token_id)
    has_pictures = not isinstance(processor, HolisticTextProcessor)
    return encoded_prompts(holistic_encoder(processor), has_pictures, "the processor")


def _placeholders(config: Any) -> list[int]:
    return [] if config.vision_config is None else [config.vision_config.image_token_id]


def check_model(
    teacher: NativeTeacher, checkpoint: Checkpoint, prompts: Prompts, progress: Progress
) -> list[CheckResult]:
    """The checks with weights."""
    loaded: list[Any] = []

    def load() -> CheckResult:
        nbytes = num_elements(checkpoint.source) * teacher.dtype.itemsize
        require_memory(teacher.device, nbytes, "HolisticVLM")
        model = load_model(
            teacher.path,
            device=teacher.device,
            dtype=teacher.dtype,
            frozen=True,
            checkpoint=checkpoint,
        )
        loaded.append(model)
        return CheckResult(
            LOADING, OK, f"HolisticVLM loads every tensor; prompts: {prompts.origin}"
        )

    found = run_step(Step(LOADING, load), progress)
    mixers = native_model.replacing_mixers()
    require_loaded(found[-1])
    if not loaded:
        names = (native_model.EAGER, native_model.GOLDEN, SELF, *(f"mixer {one}" for one in mixers))
        return [*found, *skipped(names, "the model does not load")]
    model, tokens, suppressed = loaded[0], teacher.tokens, _placeholders(checkpoint.config)

    def against_itself() -> CheckResult:
        rounding = rounding_of(model, prompts, tokens, suppressed)
        return check_rounding(SELF, rounding, None, teacher.dtype)

    runs: list[tuple[str, Callable[[], CheckResult | list[CheckResult]]]] = [
        (native_model.EAGER, lambda: native_model.check_eager(model, prompts.richest)),
        (native_model.GOLDEN, lambda: native_model.check_golden(model, checkpoint.folder)),
        (SELF, against_itself),
    ]
    for name in mixers:

        def check(mixer: str = name) -> CheckResult:
            student = native_model.student_of(model, mixer)
            rounding = rounding_of(student, prompts, tokens, suppressed)
            return check_rounding(f"mixer {mixer}", rounding, None, teacher.dtype)

        runs.append((f"mixer {name}", check))

    def memory() -> list[CheckResult]:
        shapes, new = native_model.linear_shapes(checkpoint)
        return check_memory(checkpoint.source, weight_bytes(model), teacher.device, shapes, new)

    runs.append((MEMORY, memory))
    return [*found, *(one for name, run in runs for one in run_step(Step(name, run), progress))]
