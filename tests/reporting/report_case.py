"""A run on disk as the commands leave it, made without a model."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from mmmamba_cli.evaluate import EvalOptions, ModelIdentity, find_suite, open_suite
from mmmamba_cli.evaluate.evaluator import score_answers
from mmmamba_cli.evaluate.result import DataInfo, write_result
from mmmamba_cli.profiling.interfaces import AS_SHIPPED, STUDENT
from mmmamba_cli.profiling.result import (
    CorrectnessPart,
    DevicePart,
    Measurement,
    Memory,
    PlanPart,
    Profile,
    SubjectPart,
    ratios,
)
from mmmamba_cli.recipe import dump_recipe, load_recipe
from mmmamba_cli.runs.manifest import Manifest, Parent, manifest_text

HOSTILE = '<script>alert("1")</script>&<img src=x onerror=y>'
WHEN = "2026-01-0{}T00:00:00.000000+00:00"
# Enough for intervals of both categories.
PICTURES = 10
VOID = {"img", "meta", "br", "hr"}


class Balanced(HTMLParser):
    """Parser of elements, attributes and text; fails on end tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never ended: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> ends nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(data for tag, data in self.texts if tag != "style")


def write_run(folder: Path, products: Sequence[Manifest]) -> Path:
    """A run with these products, the last one current."""
    folder.mkdir(parents=True)
    teacher = {"path": "/somewhere/my-teacher", "config": None, "arch": None}
    teacher |= {"content_hash": "t" * 64, "digests": {}}
    record = {"format": 1, "teacher": teacher, "current": products[-1].name}
    (folder / "run.json").write_text(json.dumps(record))
    for product in products:
        place = folder / "products" / product.name
        place.mkdir(parents=True)
        (place / "manifest.json").write_text(manifest_text(product))
    return folder


def product(name: str, day: int, parent: str | None = None, stage: str | None = None) -> Manifest:
    stages = () if stage is None else tuple(f"stage{i}" for i in range(1, int(stage[-1]) + 1))
    parents = [] if parent is None else [Parent("student", parent, hash_of(parent))]
    return Manifest(
        name=name,
        made_by="seed" if stage is None else "distill",
        created=WHEN.format(day),
        command=f"mmmamba make {name}",
        content_hash=hash_of(name),
        parents=(*parents, Parent("teacher", "/somewhere/my-teacher", "t" * 64)),
        attention_layers=(),
        num_layers=8,
        stages=stages,
        final=stage == "stage3",
        dtype="float32",
        parameters=1000,
        recipe=dump_recipe(load_recipe("smoke")),
        metrics={"tokens": 1234, "seconds": 5.0, "held_out": {"loss": 0.5, "agreement": 0.75}},
        versions={"torch": "9.9"},
    )


def hash_of(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def write_losses(run: Path, name: str, losses: Sequence[object]) -> None:
    rows = [{"step": i, "loss": loss} for i, loss in enumerate(losses, start=1)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "products" / name / "metrics.jsonl").write_text(text)


def write_table(folder: Path) -> Path:
    """Write SCENES.tsv: images of two categories, with two questions each, Yes then No."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "SCENES.tsv").open("w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerow(["index", "image", "image_path", "question", "answer", "category"])
        for number in range(PICTURES):
            file = io.BytesIO()
            Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(file, "PNG")
            for turn, answer in enumerate(("Yes", "No")):
                index = 2 * number + turn
                cell = base64.b64encode(file.getvalue()).decode() if turn == 0 else str(index - 1)
                category = ("count", "colour")[number % 2]
                row = [index, cell, f"{number}.png", f"Question {index}?", answer, category]
                writer.writerow(row)
    return folder


def answer(
    run: Path, data: Path, name: str, said: Sequence[str], content_hash: str | None = None
) -> None:
    """Score the answers `said` and write the files of `mmmamba eval`."""
    suite = find_suite("scenes")
    options = EvalOptions(data=data)
    table, rows = open_suite(suite, options)
    answers = {row.index: text for row, text in zip(rows, said, strict=True)}
    found = DataInfo(
        file="SCENES.tsv", sha256=table.sha256, rows=len(rows), used=len(rows), without_image=0
    )
    identity = ModelIdentity(name=name, content_hash=content_hash or hash_of(name), kind="linear")
    settings = {"limit": None, "device": "cpu", "dtype": "float32"}
    scored = score_answers(suite, rows, answers, found, identity, settings, options)
    folder = run / "evals" / name / "scenes"
    write_result(folder, scored, answers)
    timing = {"finished": WHEN.format(8), "command": f"mmmamba eval {name}"}
    (folder / "timing.json").write_text(json.dumps(timing))


def write_small_profile(run: Path) -> None:
    names = {AS_SHIPPED: AS_SHIPPED, "linear-stage3": STUDENT}
    measurements = [
        Measurement(
            subject=subject,
            task=task,  # type: ignore[arg-type]
            context=context,
            status="measured",
            rounds=((0.001 * k,),),
            memory=Memory(weights=2**20, cache=context * 1024 * k),
            median=0.001 * k,
            quartiles=(0.001 * k, 0.001 * k),
        )
        for k, subject in enumerate(names, start=1)
        for task in ("decode", "prefill")
        for context in (256, 1024)
    ]
    found = Profile(
        command="mmmamba profile",
        created=WHEN.format(9),
        compared="one thing with another",
        device=DevicePart(type="cpu", name="a processor", threads=1),
        dtype="float32",
        seed=0,
        versions={"torch": "9.9"},
        plan=PlanPart(
            contexts=(256, 1024),
            batch=1,
            repeats=1,
            rounds=1,
            warm_up=0,
            prefill=True,
            prefill_chunk=None,
            budget=None,
        ),
        notes=("a note",),
        gate=CorrectnessPart(
            green=True, tolerance=1e-4, distances={"x": {"y": 1e-7}}, what="logits"
        ),
        subjects=tuple(
            SubjectPart(
                name=name,
                role=role,
                cache="static",
                kind="linear",
                attention_layers=(),
                num_layers=8,
                weights="trained",
            )
            for name, role in names.items()
        ),
        measurements=tuple(measurements),
        ratios=ratios(measurements, names),
        seconds=1.0,
    )
    (run / "profile").mkdir()
    (run / "profile" / "profile.json").write_text(found.model_dump_json())
