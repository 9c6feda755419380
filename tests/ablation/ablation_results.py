"""Results of cells with given answers, as the runner writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmmamba_cli.ablation import CellRecord, expand, load_plan
from mmmamba_cli.ablation.answers import Questions, Texts, write_questions
from mmmamba_cli.ablation.cell_record import RuleRecord, SuiteRecord, Timing, write_record
from mmmamba_cli.evaluate.rows import Row

SCORING = "mmmamba_evals.scenes.scoring:accuracy_by_category"


def questions_of(pictures: int, categories: Sequence[str] = ("count",)) -> Questions:
    """Two questions about each picture; the pictures take turns in the categories."""
    rows = [
        Row(
            str(2 * n + turn), "", ("Yes", "No")[turn], categories[n % len(categories)], unit=str(n)
        )
        for n in range(pictures)
        for turn in range(2)
    ]
    return Questions.of("scenes", rows)


def write_cells(
    file: Path,
    answers: Mapping[str, Sequence[str]],
    questions: Questions,
    likelihood: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Results of the plan in `file` with the given answers by cell, generated and by likelihood."""
    out = file.parent / "out"
    out.mkdir(exist_ok=True)
    digest = write_questions(out, questions)
    for cell in expand(load_plan(file)):
        if cell.name not in answers:
            continue
        suites = [suite_record("scenes", questions, digest, answers[cell.name])]
        if likelihood is not None and cell.name in likelihood:
            given = likelihood[cell.name]
            suites.append(suite_record("scenes-likelihood", questions, digest, given))
        record = CellRecord(
            plan="plan",
            cell=cell.name,
            arm=cell.arm,
            seed=cell.seed,
            digest=cell.digest_with(cell.suites[: len(suites)]),
            status="finished",
            suites=tuple(suites),
            timing=Timing(date="2026-01-01"),
        )
        write_record(out, cell, record)


def answers_with(wrong: int, pictures: int = 20) -> list[str]:
    """Answers of which the first `wrong` pictures' are wrong."""
    return ["No", "Yes"] * wrong + ["Yes", "No"] * (pictures - wrong)


def suite_record(
    label: str, questions: Questions, digest: str, answers: Sequence[str]
) -> SuiteRecord:
    texts = Texts.of(answers)
    metrics = questions.scores(SCORING, texts).values()
    rule = RuleRecord(
        rule="accuracy", scoring=SCORING, metric="mean", metrics=metrics, intervals={}
    )
    return SuiteRecord(
        label=label,
        suite="scenes",
        version=2,
        suite_digest="",
        data_sha256="",
        asked=len(answers),
        not_asked=0,
        questions=digest,
        answers=texts,
        correct=questions.correct(SCORING, texts),
        settings={},
        rules=(rule,),
    )
