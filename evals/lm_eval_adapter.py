"""Adapter to lm-evaluation-harness: its text tasks with `--with lm-eval`.

`HFLM` wraps the model object itself. Custom tasks are YAML files in --data; they need no network if
their data is there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate import EvalOptions
from mmmamba_cli.evaluate.model_adapter import TransformersModel

DEFAULT_BATCH = 8


def harness_model(model: TransformersModel, batch: int | None = None) -> Any:
    """The model as the harness's `HFLM`. Raises `DataError` if lm-eval is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise DataError(
            f"lm-eval cannot be imported: {error}", "pip install 'mmmamba[eval]'"
        ) from error
    return HFLM(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        backend="causal",
        batch_size=batch or DEFAULT_BATCH,
        max_length=model.max_positions,
    )


def evaluate(
    model: TransformersModel, names: Sequence[str], options: EvalOptions, folder: Path
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness and return its scores by task.

    Raises `DataError` that names an unknown task.
    """
    harness = harness_model(model, options.batch)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if options.data is None else str(options.data))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise DataError(
            f"lm-eval has no task {', '.join(unknown)}",
            "a task of your own is a YAML file in --data; lm-eval ls tasks lists the others",
        )
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    found = simple_evaluate(
        model=harness,
        tasks=list(names),
        task_manager=manager,
        limit=options.limit,
        log_samples=False,
        **dict.fromkeys(seeds, options.seed),
    )
    return {
        task: {key: value for key, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }
