"""Teachers without a processor or a chat template: what `seed`, `distill` and `data check` say."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_lines import problem_of
from ended import Command
from families import FAMILIES, save_teacher

from mmmamba_cli.checkpoint import open_in_place
from mmmamba_cli.checkpoint.prompt_files import missing_chat_files

# The files that each case deletes, and what the message says is missing.
CASES = {
    "processor": ("qwen3_vl", "processor_config.json", "one of processor_config.json"),
    "chat template": ("qwen2", "chat_template.jinja", "chat_template.jinja"),
    "tokenizer": ("qwen2", "tokenizer.json", "one of tokenizer.json"),
}


@pytest.mark.parametrize("missing", CASES)
def test_a_seed_without_prompts_is_to_be_made_again(
    missing: str, mmmamba: Command, tmp_path: Path
) -> None:
    family, file, named = CASES[missing]
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    save_teacher(FAMILIES[family], teacher)
    assert missing_chat_files(open_in_place(teacher)) == []
    (teacher / file).unlink()
    done = mmmamba("seed", teacher, "--run", run, "--no-report", "--in-place")
    assert done.code == 0 and f"{teacher} has no {missing}: the student can be" in done.err
    line, remark = done.out.splitlines()[-2:]
    words = shlex.split(line.removeprefix("next: "))
    assert words == ["mmmamba", "seed", str(teacher), "--overwrite", "--run", str(run)]
    assert problem_of(words[1:]) is None
    assert remark.startswith(f"first add the {missing} ({named}")
    product = run / "products" / "seed"
    data = tmp_path / "data.jsonl"
    data.write_text('{"texts": [{"user": "hi", "assistant": "ho"}]}\n')
    for command in (
        ("distill", "--data", data, "--run", run),
        ("data", "check", data, "--model", product),
    ):
        done = mmmamba(*command)
        assert done.code == 2 and done.err.splitlines()[-1].startswith("error: ")
        assert missing in done.err and file in done.err, done.err
        assert "huggingface.co" not in done.err


def test_a_template_in_a_config_counts(tmp_path: Path) -> None:
    save_teacher(FAMILIES["qwen2"], tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert missing_chat_files(open_in_place(tmp_path)) == ["chat template"]
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert missing_chat_files(open_in_place(tmp_path)) == []
