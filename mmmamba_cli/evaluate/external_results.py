"""What another kit measured, as we write it down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mmmamba_cli.evaluate.evaluator import Options
from mmmamba_cli.evaluate.fingerprint import answering_versions, code_digest
from mmmamba_cli.evaluate.interfaces import Identity


@dataclass(frozen=True)
class KitResult:
    """Scores by task, and everything they depend on; no times."""

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


def kit_result(
    kit: str, identity: Identity, scores: Mapping[str, Mapping[str, Any]], options: Options
) -> KitResult:
    """A kit's scores of a model, with the settings and versions they were measured under."""
    found = answering_versions()
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
    return KitResult(kit, identity.name, identity.content_hash, settings, scores, found)
