"""Evaluation: suites of questions, how they are asked and how answers are scored."""

from mmmamba_cli.evaluate.evaluator import (
    Options,
    Scored,
    compare_with_teacher,
    evaluate_model,
    evaluate_predictions,
    open_suite,
    write_retention,
)
from mmmamba_cli.evaluate.interfaces import Encoded, EvalModel, Identity, OutOfMemory, Prompt
from mmmamba_cli.evaluate.library import find_evaluator, find_suite, published_rows, suite_names
from mmmamba_cli.evaluate.result import Result, Retention
from mmmamba_cli.evaluate.runner import Watch
from mmmamba_cli.evaluate.suite import Suite

__all__ = [
    "Encoded",
    "EvalModel",
    "Identity",
    "Options",
    "OutOfMemory",
    "Prompt",
    "Result",
    "Retention",
    "Scored",
    "Suite",
    "Watch",
    "compare_with_teacher",
    "evaluate_model",
    "evaluate_predictions",
    "find_evaluator",
    "find_suite",
    "open_suite",
    "published_rows",
    "suite_names",
    "write_retention",
]
