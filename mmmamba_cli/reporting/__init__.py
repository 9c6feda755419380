"""A run as one page to be read and sent: answers, scores, losses, costs, origins."""

from mmmamba_cli.reporting.page import Page, build_page, check_replaceable
from mmmamba_cli.reporting.run_contents import Material, read_material

__all__ = ["Material", "Page", "build_page", "check_replaceable", "read_material"]
