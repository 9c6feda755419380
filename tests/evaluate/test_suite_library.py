"""Suites and adapters of other packages, and of an installation."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import find_evaluator, find_suite, library, suite_names

SUITE = """
name: {name}
title: Somebody's
version: 3
dataset: THEIRS
columns: [index, question, answer]
rules: {{theirs: "somebody:always_right"}}
"""
MODULE = """
from pathlib import Path
from mmmamba_cli.evaluate.scoring.tally import accuracy_tally

def folder():
    return Path(__file__).parent / "their_suites"

def always_right(rows, answers):
    return accuracy_tally([1.0] * len(rows), [r.unit for r in rows], [""] * len(rows))

def evaluate(model, names, options, folder):
    return {"asked": list(names)}
"""
POINTS = """
[mmmamba.suites]
somebody = somebody:folder
[mmmamba.evaluators]
their-kit = somebody:evaluate
lm-eval = somebody:evaluate
"""


@pytest.fixture
def somebody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with suites and an adapter."""
    info = tmp_path / "somebody-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (tmp_path / "somebody.py").write_text(MODULE)
    (tmp_path / "their_suites").mkdir()
    for name in ("theirs", "mme"):
        file = tmp_path / "their_suites" / f"{name}.yaml"
        file.write_text(SUITE.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    library._suite_files.cache_clear()
    yield tmp_path
    library._suite_files.cache_clear()
    sys.modules.pop("somebody", None)


def test_others_add_suites_rules_and_adapters(somebody: Path) -> None:
    from mmmamba_cli.evaluate.scoring import find_rule

    assert "theirs" in suite_names()
    suite = find_suite("theirs")
    assert (suite.version, suite.title) == (3, "Somebody's")
    assert find_rule(suite.rules["theirs"]).__name__ == "always_right"
    assert find_evaluator("their-kit")(None, ["x"], None, None) == {"asked": ["x"]}
    # What the project ships keeps its name.
    assert find_suite("mme").title == "MME"
    assert find_evaluator("lm-eval").__module__ == "mmmamba_evals.lm_eval_adapter"


def test_a_suite_is_called_as_its_file(somebody: Path) -> None:
    (somebody / "their_suites" / "b.yaml").write_text(SUITE.format(name="a"))
    with pytest.raises(DataError, match=r"b.yaml calls itself a \(its name must be b\)"):
        find_suite("b")


def test_the_digest_is_of_what_changes_an_answer_or_a_score() -> None:
    suite = find_suite("mme")
    assert suite.model_copy(update={"title": "x", "note": "y"}).digest == suite.digest
    for change in ({"max_tiles": 7}, {"version": 2}, {"rules": {}}, {"choices": ("No",)}):
        assert suite.model_copy(update=change).digest != suite.digest


def test_a_wheel_has_suites_and_adapters(tmp_path: Path) -> None:
    """Built from the sources as they are; what it holds works without the checkout."""
    import shutil
    import subprocess

    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("mmmamba_cli", "recipes", "evals"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('out'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(installed)
    ask = (
        "import mmmamba_cli\nfrom mmmamba_cli.evaluate import *\n"
        "import json\nprint(mmmamba_cli.__file__)\n"
        "print(json.dumps([suite_names(), len(published_rows()),"
        " find_evaluator('vlmeval').__module__, find_evaluator('lm-eval').__module__]))"
    )
    asked = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = {[str(installed), *SITE]!r}\n{ask}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0, asked.stderr
    place, found = asked.stdout.splitlines()
    assert place.startswith(str(installed))
    import json

    names, tables, *modules = json.loads(found)
    assert names == suite_names()
    assert tables == 1
    assert modules == ["mmmamba_evals.vlmeval_adapter", "mmmamba_evals.lm_eval_adapter"]


# Without the .pth files there, so that an editable install of the checkout is not found.
SITE = [path for path in sys.path if path.endswith("site-packages")]
