"""What `mmmamba eval --json` prints."""

from __future__ import annotations

import json
from typing import Any

from ended import Command


def found(mmmamba: Command, *words: object) -> dict[str, Any]:
    done = mmmamba("eval", "--json", *words)
    assert done.code == 0, done.err
    loaded: dict[str, Any] = json.loads(done.out)
    return loaded


def by_rule(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {part["rule"]: part["metrics"] for part in result["rules"]}
