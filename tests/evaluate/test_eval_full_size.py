"""benchmarks/eval_full_size.py with a small model on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_checkpoint import CONFIG
from test_as_a_new_user import SIZES

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "eval_full_size.py"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("eval_full_size", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_batch_1_against_measured_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Answers in bf16 depend on the batch.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    embedding = {**CONFIG["embedding_config"], **SIZES, "num_hidden_layers": 2}
    embedding |= {"llm_vocab_size": 92553, "model_type": "holistic_embedding"}
    embedding |= {"img_context_token_id": 92546}
    language = {**CONFIG["llm_config"], **SIZES, "num_hidden_layers": 2, "eos_token_id": 2}
    raw = {**CONFIG, "embedding_config": embedding, "llm_config": {**language, "vocab_size": 92553}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw))
    for number in (1, 2):
        Image.linear_gradient("L").resize((500, 300 + number)).save(tmp_path / f"{number}.jpg")
    words = ["--rows", "24", "--max-new-tokens", "3", "--config", str(config)]
    out = tmp_path / "result.json"
    found = benchmark().main([*words, "--pictures", str(tmp_path), "--out", str(out)])
    assert json.loads(out.read_text()) == found
    runs = found["runs"]
    assert set(runs) == {"batch 1", "found batch", "too large"}
    assert [run["samples"] for run in runs.values()] == [24] * 3
    assert (runs["batch 1"]["largest_batch"], runs["batch 1"]["batches"]) == (1, 24)
    assert runs["found batch"]["largest_batch"] == 8
    assert runs["too large"]["largest_batch"] == 24
    assert found["gate_rows_identical_in_fp32"] == 8
    assert found["same_answers_in_this_dtype"] == "24 of 24"
    tiles = {int(count) for count in found["tiles"]}
    assert max(tiles) == 13
    assert len(tiles) > 2
    assert sum(found["tiles"].values()) == 24


def test_failed_gate_stops_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark()
    answers = iter((["a"], ["b"]))
    monkeypatch.setattr(module, "random_model", lambda *a, **k: None)
    monkeypatch.setattr(module, "run", lambda *a, **k: ({}, next(answers)))
    with pytest.raises(SystemExit, match="differ"):
        module.gate({}, "cpu", tmp_path, tmp_path, 1)


def test_missing_photographs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--pictures"):
        benchmark().photographs(tmp_path)
