"""Every command in the documentation is valid."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import run_page
from command_lines import ROOT_COMMAND, problem_of, unknown_options
from pages import PAGES, calls_in_fences, calls_in_sentences, shown


def as_asked(words: list[str]) -> list[str]:
    """An inline command, possibly incomplete, without trailing punctuation."""
    return [word.strip(",.;[]") for word in words if word != "..."]


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_in_blocks_are_accepted(page: Path) -> None:
    wrong = [
        f"line {line}: mmmamba {' '.join(call)}: {problem}"
        for line, call in calls_in_fences(page)
        if (problem := problem_of(call)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_in_sentences_exist(page: Path) -> None:
    wrong = []
    for call in map(as_asked, calls_in_sentences(page)):
        command, rest = ROOT_COMMAND, list(call)
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        if command is ROOT_COMMAND and not rest[0].startswith("-"):
            wrong.append(f"there is no command {' '.join(call)}")
        elif (problem := unknown_options(command, rest)) is not None:
            wrong.append(f"mmmamba {' '.join(call)}: {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_an_image_root_serves_training_and_held_out_data(page: Path) -> None:
    # Without it, held-out data may resolve to training pictures of the same name.
    for line, call in calls_in_fences(page):
        given = dict(itertools.pairwise(call))
        if "--image-root" in given and "--held-out" in given:
            folders = {Path(given[name]).parent for name in ("--data", "--held-out")}
            assert len(folders) == 1, f"line {line}: --image-root for the files of {folders}"


def test_the_tutorial_contains_its_commands() -> None:
    tutorial = next(page for page in PAGES if page.name == "tutorial.md")
    called = {call[0] for _, call in calls_in_fences(tutorial)}
    assert {"seed", "distill", "hybridize", "eval", "profile", "export"} <= called


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ("seed hovle.ckpt --set data.max_length=8", False),
        ("recipe show smoke", False),
        ("--version", False),
        ("distill ...", False),
        ("sed hovle.ckpt", True),
        ("seed", True),
        ("seed hovle.ckpt --attn-layers 3", True),
        ("hybridize --samples many", True),
        ("recipe", True),
        ("distill --no-such ...", True),
    ],
)
def test_rejected_words(words: str, refused: bool) -> None:
    assert (problem_of(words.split()) is not None) is refused


def test_calls_are_found_in_a_shell() -> None:
    text = """\
$ mmmamba status  # which
RUN=1 mmmamba seed a.ckpt \\
  --dtype fp32 && mmmamba distill > log 2>&1
torchrun --nproc-per-node 2 -m mmmamba_cli distill --run r
pip install mmmamba
cat > recipe.yaml <<'END'
mmmamba none
END
python a.py --mmmamba mmmamba
mmmamba eval --suite 'a,b' | tee log
"""
    assert list(run_page.mmmamba_calls(text)) == [
        ["status"],
        ["seed", "a.ckpt", "--dtype", "fp32"],
        ["distill"],
        ["distill", "--run", "r"],
        ["eval", "--suite", "a,b"],
    ]


def test_a_page_is_run_to_its_first_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "here"
    folder.mkdir()
    page.write_text(
        "# Page\n\n```bash\necho one > file\n```\n\n```\nfalse\n```\n"
        "\n1. In a list\n\n   ```bash\n   cat <<END\n   two\n   END\n   ```\n"
        "\n```bash\ncat file\nmmmamba --version\n```\n"
    )
    assert run_page.run(page, folder) == 0
    said = capfd.readouterr().out
    assert "page.md, line 4" in said
    assert "\none\n" in said
    assert "\ntwo\n" in said
    assert "\nmmmamba 0." in said
    page.write_text(
        page.read_text() + "\n```bash\nfalse\ntouch later\n```\n```bash\ntouch last\n```\n"
    )
    assert run_page.run(page, folder) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["file"]
