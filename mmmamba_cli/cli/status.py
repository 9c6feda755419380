"""`mmmamba status`: the products of a run and what came from what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.cli.console import out, print_json
from mmmamba_cli.cli.options import DEFAULT_RUN, AsJson, RunFolder

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from mmmamba_cli.runs import Manifest


def command(run: RunFolder = DEFAULT_RUN, as_json: AsJson = False) -> None:
    """Draw the run's lineage: its teacher, its products, and which one is current."""
    from mmmamba_cli.runs import Run

    target = Run(run)
    record, products = target.record, target.products()
    teacher = record.teacher
    if as_json:
        print_json(
            {
                "run": str(target.folder),
                "teacher": teacher and teacher.model_dump(exclude={"digests"}),
                "current": record.current,
                "products": [p.model_dump(mode="json") for p in products.values()],
            }
        )
        return
    out().print(_draw("none" if teacher is None else teacher.path, products, record.current))


def _draw(teacher: str, products: dict[str, Manifest], current: str) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text.assemble("teacher ", (teacher, "bold")))
    branches: dict[str, Tree] = {}
    for name, manifest in products.items():
        above = next((p.name for p in manifest.parents if p.role == "student"), None)
        branches[name] = branches.get(above or "", root).add(_label(manifest, name == current))
    return root


def _label(manifest: Manifest, is_current: bool) -> Text:
    from rich.text import Text

    done = "distilled end to end" if manifest.final else "not distilled end to end"
    stages = ", ".join(manifest.stages) or "no stage done"
    return Text.assemble(
        (manifest.name, "bold"),
        ("  <- current" if is_current else "", "green"),
        f"\n{manifest.kind}, {manifest.parameters / 1e6:,.1f} M, {manifest.dtype}, "
        f"{manifest.content_hash[:12]}\n{stages}, {done}",
    )
