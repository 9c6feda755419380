"""HTML report on a run: answers, scores, losses, costs, provenance."""

from mmmamba_cli.reporting.page import Page, build_page, check_replaceable
from mmmamba_cli.reporting.run_contents import ReportData, read_report_data
from mmmamba_cli.reporting.stability import write_stability_pictures

__all__ = [
    "Page",
    "ReportData",
    "build_page",
    "check_replaceable",
    "read_report_data",
    "write_stability_pictures",
]
