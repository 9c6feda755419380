"""Evaluation of models on suites: prompts, batched inference, scoring rules and results."""

from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.evaluate.evaluator import (
    EvalOptions,
    evaluate_files,
    evaluate_model,
    evaluate_predictions,
    open_suite,
)
from mmmamba_cli.evaluate.external_results import evaluate_with_kit
from mmmamba_cli.evaluate.interfaces import EncodedPrompt, EvalModel, EvalPrompt, ModelIdentity
from mmmamba_cli.evaluate.library import find_evaluator, find_suite, published_rows, suite_names
from mmmamba_cli.evaluate.model_comparison import evaluate_models
from mmmamba_cli.evaluate.process_group import ProcessGroup
from mmmamba_cli.evaluate.result import Result, ScoredSuite
from mmmamba_cli.evaluate.runner import EvalCallbacks, EvalStopped
from mmmamba_cli.evaluate.score_retention import Retention, compare_with_teacher
from mmmamba_cli.evaluate.suite import Suite

__all__ = [
    "EncodedPrompt",
    "EvalCallbacks",
    "EvalModel",
    "EvalOptions",
    "EvalPrompt",
    "EvalStopped",
    "ModelIdentity",
    "OutOfMemory",
    "ProcessGroup",
    "Result",
    "Retention",
    "ScoredSuite",
    "Suite",
    "compare_with_teacher",
    "evaluate_files",
    "evaluate_model",
    "evaluate_models",
    "evaluate_predictions",
    "evaluate_with_kit",
    "find_evaluator",
    "find_suite",
    "open_suite",
    "published_rows",
    "suite_names",
]
