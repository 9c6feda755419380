"""Models to evaluate: products of a run, its teacher, or any checkpoint we read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint import Checkpoint, load_model, open_checkpoint, pick_dtype
from mmmamba_cli.devices import pick_device
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.evaluate.interfaces import Identity
from mmmamba_cli.evaluate.model_adapter import HolisticEvalModel
from mmmamba_cli.runs import TEACHER, Run, open_processor, path_name

HASH_DIGITS = 8


@dataclass(frozen=True)
class Candidate:
    """A model that was named and not loaded yet; `open` does both hashing and loading."""

    name: str
    open: Callable[[], HolisticEvalModel]
    # None where nobody says whether the model was distilled end to end.
    final: bool | None = None


def product_candidate(run: Run, product: str | None, device: str | None, dtype: str) -> Candidate:
    """A product of a run, the current one if None. Raises `RunError` if there is none such."""
    name = product or run.record.current
    manifest = run.product(name)

    def open_it() -> HolisticEvalModel:
        run.verify_product(name)
        return open_model(
            run.open_product(name),
            name,
            device,
            dtype,
            content_hash=manifest.content_hash,
            kind=manifest.kind,
            final=manifest.final,
        )

    return Candidate(name, open_it, manifest.final)


def teacher_candidate(run: Run, moved_to: Path | None, device: str | None, dtype: str) -> Candidate:
    """The teacher of a run. Raises `RunError` if it is no longer there or another one."""
    checkpoint = run.open_teacher(moved_to)

    def open_it() -> HolisticEvalModel:
        run.verify_teacher(checkpoint)
        known = run.teacher.content_hash
        return open_model(checkpoint, TEACHER, device, dtype, content_hash=known, kind=TEACHER)

    return Candidate(TEACHER, open_it)


def path_candidate(path: Path, device: str | None, dtype: str) -> Candidate:
    """Any checkpoint: a folder of ours, HoVLE, a language model."""
    checkpoint = open_checkpoint(path)
    name = path_name(path)
    return Candidate(name, lambda: open_model(checkpoint, name, device, dtype))


def open_model(
    checkpoint: Checkpoint,
    name: str,
    device: str | None,
    dtype: str,
    *,
    content_hash: str | None = None,
    kind: str = "",
    final: bool | None = None,
) -> HolisticEvalModel:
    """Load a checkpoint for evaluation; its tensors are hashed if their hash is not known.

    `device` None is CUDA where there is one; dtype "auto" is bf16 there, and fp32 on a CPU. Raises
    `CheckpointError` if it has no tokenizer or the device is not there.
    """
    processor = open_processor(checkpoint)
    if processor is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer, so it cannot be asked anything",
            "put the teacher's tokenizer.model there, or seed again with --tokenizer FILE",
        )
    chosen = pick_device(device)
    kept = pick_dtype(dtype, chosen)
    identity = Identity(
        name=name,
        content_hash=content_hash or checkpoint.source.content_hash(),
        kind=kind,
        final=final,
        answers_depend_on={
            "config": _digest(checkpoint.config.to_dict()),
            "processor": _digest(processor.to_dict()),
            "device": chosen.type,
            "dtype": str(kept).removeprefix("torch."),
        },
    )
    model = load_model(
        checkpoint.path, device=chosen, dtype=kept, frozen=True, checkpoint=checkpoint
    )
    return HolisticEvalModel(model, processor, identity)


def _digest(settings: dict[str, Any]) -> str:
    """Of settings that are saved with a model, whatever wrote them."""
    strangers = ("transformers_version", "dtype", "architectures", "_name_or_path")
    kept = {key: value for key, value in settings.items() if key not in strangers}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
