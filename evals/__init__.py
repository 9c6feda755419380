"""What `mmmamba eval` ships: suites as YAML, published results, adapters to other kits."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path


def suite_folder() -> Traversable:
    """The folder of suites, one YAML file each; `mmmamba.suites` leads here."""
    beside = Path(__file__).resolve().parent / "suites"
    return beside if beside.is_dir() else resources.files(__name__) / "suites"
