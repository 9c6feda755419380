"""Evaluation by another kit (VLMEvalKit, lm-eval), and the record of its scores."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmmamba_cli.checkpoint import atomic_write_text
from mmmamba_cli.evaluate.evaluator import EvalOptions
from mmmamba_cli.evaluate.fingerprint import code_digest, library_versions
from mmmamba_cli.evaluate.interfaces import EvalModel, ModelIdentity
from mmmamba_cli.evaluate.library import find_evaluator
from mmmamba_cli.evaluate.result import RESULT
from mmmamba_cli.evaluate.runner import EvalCallbacks
from mmmamba_cli.runs import ResolvedModel


@dataclass(frozen=True)
class ExternalResult:
    """Scores by task, with the settings and versions they depend on; no times."""

    kit: str
    model: str
    content_hash: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def json_text(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"


def evaluate_with_kit(
    kit: str,
    models: Sequence[ResolvedModel],
    load: Callable[[ResolvedModel], EvalModel],
    tasks: Sequence[str],
    folder: Path,
    options: EvalOptions,
    callbacks: EvalCallbacks,
) -> list[ExternalResult]:
    """Evaluate every model on the kit's tasks; `folder`/MODEL/KIT gets its files and the result.

    `load` loads a model when its turn comes; one at a time is in memory.
    """
    evaluate = find_evaluator(kit)
    found = []
    for resolved in models:
        place = folder / resolved.name / kit
        with callbacks.if_interrupted(
            f"{kit} was asking {resolved.name}, whose scores are not written; those of models "
            f"before it are in {folder}, and the same command begins with what {kit} keeps itself"
        ):
            model = load(resolved)
            place.mkdir(parents=True, exist_ok=True)
            scores = evaluate(model, tasks, options, place)
        found.append(external_result(kit, model.identity, scores, options))
        del model
        gc.collect()
        atomic_write_text(place / RESULT, found[-1].json_text())
    return found


def external_result(
    kit: str, identity: ModelIdentity, scores: Mapping[str, Mapping[str, Any]], options: EvalOptions
) -> ExternalResult:
    """The scores of a model, with the settings and versions they depend on."""
    found = library_versions()
    try:
        found[kit] = version(kit)
    except PackageNotFoundError:
        found[kit] = "unknown"
    settings = {
        "limit": options.limit,
        "max_tiles": options.max_tiles,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "code": code_digest(),
        **identity.answers_depend_on,
    }
    return ExternalResult(kit, identity.name, identity.content_hash, settings, scores, found)
