"""Run directories of cells: copies of shared ones, and what is removed from finished ones."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mmmamba_cli.checkpoint.atomic_writes import atomic_folder
from mmmamba_cli.runs import Run
from mmmamba_cli.runs.run import PRODUCTS, RUN_RECORD

# Values of `keep` that are no names of products.
ALL, NONE, EVALUATED = "all", "none", "evaluated"
TRAINING = "training"
STEP_FOLDER = re.compile(r"step-(\d{8})")


def copy_run(source: Path, target: Path) -> None:
    """Copy the record and products of a run, by hard links where the file system has them.

    Files of products are replaced and never changed, so that links are safe.
    """
    with atomic_folder(target, overwrite=True) as partial:
        shutil.copytree(source / PRODUCTS, partial / PRODUCTS, copy_function=_link)
        shutil.copy2(source / RUN_RECORD, partial / RUN_RECORD)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links.
        shutil.copy2(source, target)


def prune_run(folder: Path, keep: Sequence[str], evaluated: str | None) -> None:
    """Remove training states, and the products that `keep` does not name; repeatable.

    `evaluated` is the product that was evaluated, None for the teacher. Without any product left,
    the folder goes.
    """
    if not folder.is_dir():
        return
    products = folder / PRODUCTS
    there = [path for path in products.iterdir() if path.is_dir()] if products.is_dir() else []
    if ALL in keep:
        kept = [path.name for path in there]
    else:
        kept = [name for name in keep if (products / name).is_dir()]
        if EVALUATED in keep and evaluated in {path.name for path in there}:
            assert evaluated is not None
            kept.append(evaluated)
    if not kept:
        shutil.rmtree(folder)
        return
    run = Run(folder)
    if run.record.current not in kept:
        run.set_current(kept[-1])
    for path in [folder / TRAINING, folder / "tensorboard", *there]:
        if path.is_dir() and (path not in there or path.name not in kept):
            shutil.rmtree(path)


def has_product(folder: Path, name: str, content_hash: str) -> bool:
    """Whether the run in a folder has a product of that name and content."""
    run = Run(folder)
    found = run.products().get(name) if run.exists else None
    return found is not None and found.content_hash == content_hash


def steps_done(folder: Path) -> tuple[tuple[str, ...], int]:
    """The stages that a run has done, and the steps of the next one that are saved."""
    run = Run(folder)
    if not run.exists:
        return (), 0
    done = run.product(run.record.current).stages
    names = (path.name for path in (folder / TRAINING).glob("*/step-*"))
    steps = [int(match[1]) for match in map(STEP_FOLDER.fullmatch, names) if match]
    return done, max(steps, default=0)
