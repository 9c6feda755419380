"""Run directories: products, their manifests and lineage, and the lock on them."""

from mmmamba_cli.runs.importing import import_student
from mmmamba_cli.runs.manifest import Manifest, Parent, read_manifest
from mmmamba_cli.runs.product import Draft, open_processor, write_companions, write_product
from mmmamba_cli.runs.run import Run, RunRecord, Teacher

__all__ = [
    "Draft",
    "Manifest",
    "Parent",
    "Run",
    "RunRecord",
    "Teacher",
    "import_student",
    "open_processor",
    "read_manifest",
    "write_companions",
    "write_product",
]
