"""The rule of answers that were chosen by likelihood among candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmmamba_cli.evaluate.candidates import Candidates
from mmmamba_cli.evaluate.rows import Row
from mmmamba_cli.evaluate.scoring.chance import option_chance
from mmmamba_cli.evaluate.scoring.unit_scores import UnitScores, accuracy_scores

# The rule's name in results, and the name of its function.
LIKELIHOOD = "likelihood"
CANDIDATE_ACCURACY = "candidate_accuracy"


def candidate_accuracy(
    rows: Sequence[Row], answers: Sequence[str], candidates: Sequence[Candidates]
) -> UnitScores:
    """Accuracy x 100: the share of rows whose chosen answer is the right candidate."""
    points = [float(answer == one.right) for answer, one in zip(answers, candidates, strict=True)]
    scores = accuracy_scores(points, [row.unit for row in rows], [row.category for row in rows])
    chance = option_chance([len(one.texts) for one in candidates])
    return replace(scores, chance={} if chance is None else {"accuracy": chance})
