"""The results of a run, read from its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmmamba_cli.errors import RunError
from mmmamba_cli.evaluate.result import EVALS, RESULT, Result, RuleResult, read_result


@dataclass(frozen=True)
class RunResults:
    """The results of a run by file; `left_out` has a sentence for each file that is not used."""

    results: Mapping[Path, Result]
    left_out: tuple[str, ...]

    def of_model(self, content_hash: str | None) -> list[Result]:
        """The results of the model with these weights."""
        return [one for one in self.results.values() if one.model.content_hash == content_hash]


def read_run_results(run_folder: Path) -> RunResults:
    """Every `result.json` below a run's `evals` folder, sorted by path.

    Results of other kits, which have the same file name, and damaged files are left out by name.
    """
    results: dict[Path, Result] = {}
    left_out = []
    for file in sorted((run_folder / EVALS).rglob(RESULT)):
        try:
            results[file] = read_result(file)
        except RunError as error:
            left_out.append(error.message)
    return RunResults(results, tuple(left_out))


def matching_value(results: Iterable[Result], result: Result, part: RuleResult) -> float | None:
    """The metric of `part` in the first result with the same questions and rule, if there is one.

    `result` is the result that `part` belongs to; `results` are those of another model.
    """
    for other in results:
        theirs = other.rule(part.rule)
        same = other.suite == result.suite and other.data.same_questions(result.data)
        # Scores of chosen and of generated answers are not comparable.
        same = same and other.settings.get("answers") == result.settings.get("answers")
        if same and theirs is not None:
            return theirs.metrics.get(part.metric)
    return None
