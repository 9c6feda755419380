"""Suites and adapters of plugins and of a wheel."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.evaluate import EvalOptions, find_evaluator, find_suite, library, suite_names
from mmmamba_cli.evaluate.evaluator import open_suite
from mmmamba_cli.evaluate.suite import parse_suite, undated

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
from mmmamba_cli.evaluate.scoring.unit_scores import accuracy_scores

def folder():
    return Path(__file__).parent / "their_suites"

def always_right(rows, answers):
    return accuracy_scores([1.0] * len(rows), [r.unit for r in rows], [""] * len(rows))

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


def test_plugins_add_suites_rules_and_adapters(somebody: Path) -> None:
    from mmmamba_cli.evaluate.scoring import find_rule

    assert "theirs" in suite_names()
    suite = find_suite("theirs")
    assert (suite.version, suite.title) == (3, "Somebody's")
    assert find_rule(suite.rules["theirs"]).__name__ == "always_right"
    assert find_evaluator("their-kit")(None, ["x"], None, None) == {"asked": ["x"]}
    # A plugin cannot replace a shipped suite.
    assert find_suite("mme").title == "MME"
    assert find_evaluator("lm-eval").__module__ == "mmmamba_evals.lm_eval_adapter"


BROKEN_PACKAGES = {
    "def folder(:\n": r"SyntaxError: .* at .*somebody.py:1 \(mend somebody, or uninstall it\)",
    "import nothing_like_it\n": "ModuleNotFoundError: No module named 'nothing_like_it' at .*.py:1",
    "def folder():\n    return 1 / 0\n": "ZeroDivisionError: division by zero at .*somebody.py:2",
    "files = 3\n": "AttributeError: module 'somebody' has no attribute 'folder'",
}


@pytest.mark.parametrize("text", BROKEN_PACKAGES)
def test_a_package_that_fails_is_named(somebody: Path, text: str) -> None:
    (somebody / "somebody.py").write_text(text)
    with pytest.raises(MmmambaError, match=BROKEN_PACKAGES[text]) as error:
        find_suite("mme")
    assert "package somebody: its entry point somebody = somebody:folder in " in str(error.value)


def test_a_package_must_give_a_folder(somebody: Path) -> None:
    for value in ("3", "'nowhere'"):
        sys.modules.pop("somebody", None)
        (somebody / "somebody.py").write_text(f"def folder():\n    return {value}\n")
        with pytest.raises(DataError, match=f"gives {value}, which is not a folder .it names the"):
            suite_names()


def test_a_rule_that_cannot_be_imported_is_found_before_the_questions(somebody: Path) -> None:
    text = SUITE.format(name="theirs").replace("always_right", "always_rihgt")
    suite = parse_suite(text, "theirs.yaml")
    with pytest.raises(DataError, match="scoring rule somebody:always_rihgt cannot be imported"):
        open_suite(suite, EvalOptions(data=somebody))


def test_suite_name_must_match_its_file(somebody: Path) -> None:
    (somebody / "their_suites" / "b.yaml").write_text(SUITE.format(name="a"))
    with pytest.raises(DataError, match=r"b.yaml calls itself a \(its name must be b\)"):
        find_suite("b")


def test_digest_covers_answers_and_scores() -> None:
    suite = find_suite("mme")
    assert suite.model_copy(update={"title": "x", "note": "y"}).digest == suite.digest
    for change in ({"max_tiles": 7}, {"version": 2}, {"rules": {}}, {"choices": ("No",)}):
        assert suite.model_copy(update=change).digest != suite.digest


def test_questions_digest_ignores_rules() -> None:
    suite = find_suite("seed")
    other = suite.model_copy(update={"rules": {}, "earlier": {}})
    assert other.questions_digest == suite.questions_digest
    for change in ({"max_tiles": 7}, {"version": 2}, {"columns": ("index", "question")}):
        assert suite.model_copy(update=change).questions_digest != suite.questions_digest


def test_kit_name_without_date_is_its_newest_rule() -> None:
    seed, bench, mme = find_suite("seed"), find_suite("mmbench"), find_suite("mme")
    assert next(iter(seed.rules)) == "vlmevalkit-2026-06"
    assert seed.scoring("vlmevalkit") == {"vlmevalkit-2026-06": "choice_rows_2026_06"}
    assert seed.scoring("vlmevalkit-2025-08") == {"vlmevalkit-2025-08": "choice_rows_2025_08"}
    assert list(bench.scoring("vlmevalkit-circular")) == ["vlmevalkit-circular-2026-06"]
    assert list(bench.scoring("vlmevalkit-rows")) == ["vlmevalkit-rows-2026-06"]
    # The kit never changed this rule, so it has no date.
    assert list(mme.scoring("vlmevalkit")) == ["vlmevalkit"]
    with pytest.raises(DataError, match="has no rule vlmevalkit-2025-01, it has: vlmevalkit-2026"):
        seed.scoring("vlmevalkit-2025-01")


@pytest.mark.parametrize("name", suite_names())
def test_published_rule_is_scored(name: str) -> None:
    suite = find_suite(name)
    if suite.published is not None:
        assert suite.published.rule in suite.rules
    if suite.rules:
        # Retention uses the newest version.
        first = next(iter(suite.rules))
        assert first == max(rule for rule in suite.rules if undated(rule) == undated(first))
