"""Lines at the end of the demo: the result in two sentences, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demo_steps import LEAD, PAGE, RESULTS, SEEDED, UNSEEDED

from mmmamba_cli.reporting import read_report_data
from mmmamba_cli.reporting.lead import summary_sentences
from mmmamba_cli.reporting.lead_contents import read_lead
from mmmamba_cli.reporting.models import model_details
from mmmamba_cli.reporting.suite_results import suite_results


def summary(folder: Path, lead: Sequence[str] = LEAD) -> list[str]:
    """The sentences that lead the page, and its path; read from the files of a finished demo.

    They are about the shipped models, as measured in the files `lead` of benchmarks/results. The
    demo's own profile is not quoted: it is short, and other programs may run beside it.
    """
    files = [RESULTS / name for name in lead]
    found = read_report_data(folder / SEEDED, [folder / UNSEEDED], files)
    contents = read_lead(found, suite_results(found, None), model_details(found))
    return [*summary_sentences(contents), f"open in a browser: {folder / PAGE}"]
