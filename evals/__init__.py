"""Shipped evaluation suites, published results, adapters to other kits, and demo models."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIPPED_MODELS = ("teacher", "linear", "hybrid")


def suite_folder() -> Traversable:
    """The folder of suites, one YAML file each; the entry point of `mmmamba.suites`."""
    beside = HERE / "suites"
    return beside if beside.is_dir() else resources.files(__name__) / "suites"


def model_folders() -> dict[str, Path]:
    """The installed models of composed scenes by name; the entry point of `mmmamba.models`."""
    folder = HERE / "scenes" / "models"
    found = {f"scenes-{name}": folder / name for name in SHIPPED_MODELS}
    return {name: place for name, place in found.items() if (place / "config.json").is_file()}
