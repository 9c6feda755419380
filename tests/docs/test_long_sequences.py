"""docs/how-to/long-sequences.md has the numbers that its benchmark counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "activation_and_communication_bytes.json"
PAGE = ROOT / "docs" / "how-to" / "long-sequences.md"
ROWS = {
    "stage1": "stage 1, GiB",
    "stage2": "stage 2",
    "stage3": "stage 3, every layer recomputed",
    "stage3, nothing recomputed": "stage 3, nothing recomputed",
}


def test_the_result_is_what_the_shapes_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["activation_and_communication_bytes.py"])
    import activation_and_communication_bytes

    found = json.loads(json.dumps(activation_and_communication_bytes.main([])))
    kept = json.loads(RESULT.read_text(encoding="utf-8"))
    assert found["lengths"] == kept["lengths"]


def test_the_page_has_these_numbers() -> None:
    lengths = json.loads(RESULT.read_text(encoding="utf-8"))["lengths"]
    page = PAGE.read_text(encoding="utf-8")
    for stage, title in ROWS.items():
        cells = " | ".join(str(row["memory_gib"][stage]) for row in lengths.values())
        assert f"| {title} | {cells} |" in page
    for title, name in (("ring: keys", "ring"), ("all to all: columns", "all to all")):
        cells = " | ".join(
            f"{lengths[length]['mib_per_layer'][gpus][name]:,.0f}"
            for length in ("32768", "131072")
            for gpus in ("2", "8")
        )
        (line,) = (line for line in page.splitlines() if f"| attention, {title}" in line)
        assert line.endswith(f"| yes | {cells} |")
