"""lm-eval adapter: the same likelihoods as with the transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ended import Command
from families import FAMILIES, save_teacher
from small_language_models import write, write_tokenizer

from mmmamba_cli.evaluate import EvalOptions, find_evaluator
from mmmamba_cli.evaluate.model_adapter import HolisticVLMAdapter, load_eval_model
from mmmamba_cli.runs import resolve_path

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'mmmamba[eval]'")
find_evaluator("lm-eval")
import mmmamba_evals.lm_eval_adapter as adapter  # noqa: E402

WORDS = ("the cat sat on the mat and " * 3).split()
CHOICES = ("mat", "dog", "cat sat on the dog")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1}}
"""
CHOOSE = """doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc}]
"""
SAY = """doc_to_target: said
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def language_model(tmp_path: Path) -> tuple[Path, Any]:
    """A small random Llama as a folder, and transformers' own model of it."""
    folder = tmp_path / "llama"
    theirs = write(folder, "Llama", {"eos_token_id": 2, "pad_token_id": 0})
    write_tokenizer(folder)
    return folder, theirs


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two local tasks of 12 questions, with local data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [
        {
            "question": " ".join(WORDS[: 3 + i]),
            "choices": CHOICES,
            "answer": i % 3,
            "said": "",
        }
        for i in range(12)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, kind, rest in (
        ("local_choose", "multiple_choice", CHOOSE),
        ("local_say", "generate_until", SAY),
    ):
        text = TASK.format(name=name, file=file, kind=kind) + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


def opened(path: Path) -> HolisticVLMAdapter:
    return load_eval_model(resolve_path(path), "cpu", "fp32")


def scored(harness: Any, tasks: Path, name: str = "local_choose") -> Any:
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=harness, tasks=[name], task_manager=TaskManager(include_path=str(tasks))
    )


def test_likelihoods_equal_those_of_the_transformers_model(
    language_model: tuple[Path, Any], tasks: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    folder, theirs = language_model
    ours = opened(folder)
    reference = HFLM(
        pretrained=theirs, tokenizer=ours.processor.tokenizer, batch_size=3, backend="causal"
    )
    found = []
    for harness in (adapter.harness_model(ours, 3), reference):
        samples = scored(harness, tasks)["samples"]["local_choose"]
        found.append([float(one[0]) for sample in samples for one in sample["filtered_resps"]])
    assert len(found[0]) == 36
    assert len(set(found[0])) > 20
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_adapter_returns_the_scores_of_the_harness(
    language_model: tuple[Path, Any], tasks: Path, tmp_path: Path
) -> None:
    folder, _ = language_model
    model = opened(folder)
    names = ["local_choose", "local_say"]
    scores = adapter.evaluate(model, names, EvalOptions(data=tasks), tmp_path)
    assert set(scores) == set(names)
    expected = scored(adapter.harness_model(model), tasks)["results"]["local_choose"]
    assert scores["local_choose"]["acc,none"] == expected["acc,none"]
    assert 0 < scores["local_choose"]["acc,none"] < 1
    assert scores["local_say"]["exact_match,none"] == 0.0
    few = adapter.evaluate(model, ["local_choose"], EvalOptions(data=tasks, limit=3), tmp_path)
    assert few["local_choose"]["acc,none"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


def test_seeded_student_of_a_language_model_and_its_teacher(
    language_model: tuple[Path, Any], tasks: Path, tmp_path: Path, mmmamba: Command
) -> None:
    folder, _ = language_model
    run, out = tmp_path / "run", tmp_path / "out"
    assert mmmamba("seed", folder, "--no-report", "--run", run).code == 0
    words = ["--run", run, "--teacher", "--data", tasks, "--out", out, "--with", "lm-eval"]
    done = mmmamba("eval", "--suite", "local_choose", *words, "--json")
    assert done.code == 0, done.err
    student, teacher = json.loads(done.out)
    assert (student["model"], teacher["model"]) == ("seed", "teacher")
    for found in (student, teacher):
        assert 0 <= found["scores"]["local_choose"]["acc,none"] <= 1
        assert found["versions"]["lm-eval"] == lm_eval.__version__
    written = json.loads((out / "seed" / "lm-eval" / "result.json").read_text())
    assert written == student


def test_text_tasks_of_a_vision_language_model(
    small_run: Path, tasks: Path, tmp_path: Path, mmmamba: Command
) -> None:
    words = ["--run", small_run, "--data", tasks, "--out", tmp_path, "--with", "lm-eval"]
    done = mmmamba("eval", "--suite", "local_choose,local_say", *words, "--limit", 4)
    assert done.code == 0, done.err
    assert "local_choose" in done.out


def test_students_of_other_teachers(tasks: Path, tmp_path: Path, mmmamba: Command) -> None:
    save_teacher(FAMILIES["qwen3"], tmp_path / "qwen3")
    run, out = tmp_path / "run", tmp_path / "out"
    words = ("--in-place", "--no-report", "--dtype", "fp32", "--run", run)
    assert mmmamba("seed", tmp_path / "qwen3", *words).code == 0
    words = ("--run", run, "--teacher", "--data", tasks, "--out", out, "--with", "lm-eval")
    done = mmmamba("eval", "--suite", "local_choose,local_say", *words, "--json", "--limit", 4)
    assert done.code == 0, done.err
    student, teacher = json.loads(done.out)
    assert (student["model"], teacher["model"]) == ("seed", "teacher")
    for found in (student, teacher):
        assert set(found["scores"]) == {"local_choose", "local_say"}
        assert 0 <= found["scores"]["local_choose"]["acc,none"] <= 1


def test_unknown_task(small_run: Path, tasks: Path, tmp_path: Path, mmmamba: Command) -> None:
    words = ["--run", small_run, "--data", tasks, "--out", tmp_path, "--with", "lm-eval"]
    done = mmmamba("eval", "--suite", "local_chose", *words)
    assert done.code == 2
    assert "lm-eval has no task local_chose" in done.err


def test_missing_lm_eval_gives_pip_line(
    small_run: Path, tmp_path: Path, mmmamba: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    words = ["--run", small_run, "--out", tmp_path, "--with", "lm-eval"]
    done = mmmamba("eval", "--suite", "local_choose", *words)
    assert done.code == 2
    assert "pip install 'mmmamba[eval]'" in done.err
