"""transformers' common tests run only if `make conformance` has prepared them.

Expected failures are listed in choices.yaml with their reasons. Any other failure fails the run.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

UPSTREAM = os.environ.get("MMMAMBA_UPSTREAM_TESTS")
CHOICES = Path(__file__).parent / "choices.yaml"

if UPSTREAM is None:
    collect_ignore_glob = ["test_conformance_*.py"]
else:
    sys.path[:0] = [UPSTREAM, f"{UPSTREAM}/utils"]


# Markers of transformers' own tests.
MARKERS = (
    "accelerate_tests",
    "bitsandbytes",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "is_staging_test",
    "torch_compile_test",
    "torch_export_test",
    "training_ci",
    "fsdp_ci",
    "slow",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in MARKERS if UPSTREAM is not None else ():
        config.addinivalue_line("markers", f"{name}: of transformers")


def choices() -> list[dict[str, str | list[str]]]:
    loaded: list[dict[str, str | list[str]]] = yaml.safe_load(CHOICES.read_text(encoding="utf-8"))
    return loaded


def function_name(name: str) -> str:
    """The test function without the suffix of `parameterized`: `test_x` for `test_x_03_fp16`."""
    return re.sub(r"(_\d+(_.*)?|\[.*\])$", "", name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        (choice["test"], variant): str(choice["reason"])
        for choice in choices()
        for variant in choice["variants"]
    }
    for item in items:
        variant = item.parent.name if item.parent is not None else ""
        for name in (item.name, function_name(item.name)):
            if (name, variant) in reasons:
                item.add_marker(pytest.mark.xfail(reason=reasons[name, variant], strict=False))
                break
