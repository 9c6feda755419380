"""Releases of transformers that are accepted, warned about and refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small import small_model

from mmmamba_cli import versions
from mmmamba_cli.checkpoint import open_checkpoint
from mmmamba_cli.errors import MmmambaError, MmmambaWarning
from mmmamba_cli.versions import KnownIncompatibility, require_versions


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Fake installed versions."""
    installed = {"transformers": "5.23.0"}
    monkeypatch.setattr(versions, "installed_version", installed.get)
    require_versions.cache_clear()
    yield installed
    require_versions.cache_clear()


@pytest.mark.parametrize("text", ["5.16.2", "4.57.0", "6.0.0"])
def test_releases_outside_the_bounds_are_refused(found: dict[str, str], text: str) -> None:
    found["transformers"] = text
    with pytest.raises(MmmambaError, match=rf"transformers {text} is installed, mmmamba needs >=5"):
        require_versions()


@pytest.mark.parametrize("text", ["5.17.0", "5.23.0", "5.24.0", "5.24.3"])
def test_tested_releases_do_not_warn(found: dict[str, str], text: str) -> None:
    found["transformers"] = text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_versions()


@pytest.mark.parametrize("text", ["5.25.0", "5.25.0.dev0", "5.100.1"])
def test_newer_releases_warn_once(found: dict[str, str], text: str) -> None:
    found["transformers"] = text
    with pytest.warns(MmmambaWarning, match=rf"transformers {text} is newer than 5\.24") as said:
        require_versions()
        require_versions()
    assert len(said) == 1


def test_known_incompatibilities_are_refused(
    found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = KnownIncompatibility(
        "odd", {"transformers": ">=5.23,<5.23.1", "peft": ">=0.1"}, "peft {peft} breaks", "update",
        requires_any=("accelerate",), is_fatal=True,
    )  # fmt: skip
    monkeypatch.setattr(
        versions, "KNOWN_INCOMPATIBILITIES", (*versions.KNOWN_INCOMPATIBILITIES, pair)
    )
    require_versions()
    require_versions.cache_clear()
    found["peft"] = "0.5"
    require_versions()
    require_versions.cache_clear()
    found["accelerate"] = "1"
    with pytest.raises(MmmambaError, match=r"odd: peft 0\.5 breaks \(update\)"):
        require_versions()


def test_import_of_the_model_is_refused_with_one_sentence() -> None:
    """The check precedes imports that an older transformers lacks."""
    program = """
import importlib.metadata as metadata, sys
real = metadata.version
metadata.version = lambda name: "5.16.0" if name == "transformers" else real(name)
from mmmamba_cli.errors import MmmambaError
try:
    import mmmamba_cli.model
except MmmambaError as error:
    assert "transformers" not in sys.modules
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == (
        "transformers 5.16.0 is installed, mmmamba needs >=5.17,<6 "
        "(pip install 'transformers>=5.17,<6')\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("classes", "old"),
    [
        (None, False),
        ({"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}, True),
        ({"AutoConfig": "c.C", "AutoModel": "m.B", "AutoModelForCausalLM": "m.M"}, False),
    ],
)
def test_an_export_with_older_code_asks_to_export_again(
    tmp_path: Path, classes: Any, old: bool
) -> None:
    small_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": classes}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        open_checkpoint(tmp_path)
    texts = [str(one.message) for one in said if issubclass(one.category, MmmambaWarning)]
    assert bool(texts) == old
    assert all("Export the model again" in text for text in texts)
