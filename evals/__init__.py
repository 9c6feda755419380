"""What `mmmamba eval` ships: suites as YAML, published results, adapters to other kits."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIPPED_MODELS = ("teacher", "linear", "hybrid")


def suite_folder() -> Traversable:
    """The folder of suites, one YAML file each; `mmmamba.suites` leads here."""
    beside = HERE / "suites"
    return beside if beside.is_dir() else resources.files(__name__) / "suites"


def model_folders() -> dict[str, Path]:
    """Models of composed scenes by name, those that are there; `mmmamba.models` leads here."""
    folder = HERE / "scenes" / "models"
    found = {f"scenes-{name}": folder / name for name in SHIPPED_MODELS}
    return {name: place for name, place in found.items() if (place / "config.json").is_file()}
