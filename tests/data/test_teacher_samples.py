"""Samples that a teacher's processor does not take, drawn pictures, orientation, `data check`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, picture, save_teacher
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from mmmamba_cli.cli.app import app
from mmmamba_cli.data import (
    IGNORE_INDEX,
    Drawing,
    Sample,
    StepLoader,
    check_data,
    open_corpus,
)
from mmmamba_cli.data.drawn_pictures import draw_pictures
from mmmamba_cli.data.teacher_collator import TeacherCollator
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, Tiling, choose_grid


class Gradients:
    """Pictures whose red grows to the right and whose green grows downwards."""

    identity = "gradients"

    def sample(self, index: int, name: str) -> Sample:
        raise NotImplementedError

    def stack(self, drawings: Sequence[Drawing], tiling: Tiling) -> Any:
        return [choose_grid(one.width, one.height, tiling) for one in drawings], tiling.image_size

    def to_pixels(self, layouts: Any, device: torch.device) -> Tensor:
        grids, side = layouts
        return torch.cat([self._tiles(*grid, side) for grid in grids])

    def _tiles(self, columns: int, rows: int, side: int) -> Tensor:
        red = torch.linspace(0, 255, columns * side).expand(rows * side, -1)
        green = torch.linspace(0, 255, rows * side)[:, None].expand(-1, columns * side)
        whole = torch.stack([red, green, torch.zeros_like(red)]).to(torch.uint8)
        tiles = whole.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        return tiles.reshape(-1, 3, side, side)


def collator(name: str, max_length: int = 4096) -> TeacherCollator:
    return TeacherCollator(TeacherProcessor(FAMILIES[name].processor), max_length)


def asked(question: str, answer: str = "A square.", **more: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, **more}


def write_set(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return caught.value.message


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One good sample, and one for each thing that can be wrong with a sample."""
    picture(24, 16).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(data[: len(data) - 30])
    # Qwen's processors take no picture that is 200 times as long as wide.
    Image.new("RGB", (1, 300)).save(tmp_path / "line.png")
    return write_set(
        tmp_path,
        asked("<image>\nWhat?", image="good.png"),
        asked("<image>\nWhat?", image="short.png"),
        asked("<image>\nWhat?", image="line.png"),
        asked("<image><image>\nWhat?", image="good.png"),
        asked("What?", "It ends.<|im_end|>"),
        asked("What is <|image_pad|>?"),
        {"text": ""},
    )


def test_a_sample_that_the_processor_does_not_take_is_named(mixed: Path) -> None:
    processor = TeacherProcessor(FAMILIES["qwen3_vl"].processor)
    corpus = open_corpus(mixed)
    reasons = {
        "2": "damaged or truncated",
        "3": "the processor does not take a picture of 1 x 300 pixels",
        "4": "2 <image> but 1 images",
        "5": "turn 2 writes <|im_end|>, a token that the chat template writes",
        "6": "turn 1 writes <|image_pad|>, a token that stands for a picture",
        "7": "expected text",
    }
    found = check_data(corpus, processor, 400)
    loader = StepLoader(corpus, processor, batch_size=7, max_length=400, shuffle=False)
    (batch,) = (step := loader.step(0)).micro_batches
    assert batch.names == ("train.jsonl:1",)
    for bad in (found.bad, step.bad):
        by_line = {sample.name.rpartition(":")[2]: sample.reason for sample in bad}
        assert set(by_line) == set(reasons)
        assert all(reason in by_line[line] for line, reason in reasons.items())
    assert (found.samples, found.images, found.answer_tokens > 2) == (7, 1, True)
    # Only the process that decodes a picture sees that it is damaged.
    assert [sample.seen_by_all for sample in step.bad].count(False) == 1


def test_text_is_cut_to_the_maximum_length_and_pictures_are_not(tmp_path: Path) -> None:
    picture(24, 16).save(tmp_path / "a.png")
    source = write_set(tmp_path, asked("<image>\nWhat?", "one two three", image="a.png"))
    (sample,) = open_corpus(source)  # type: ignore[misc]
    whole = collator("qwen3_vl").encode(sample)
    make = collator("qwen3_vl", len(whole) - 3)
    cut = make.encode(sample)
    batch, _ = make.collate([[cut]])
    assert (len(cut), cut.cut) == (len(whole) - 3, 3)
    assert batch.num_tokens == batch.labels.shape[1] == len(cut)
    assert {value.shape[1] for value in batch.inputs.values() if value.shape[0] == 1} >= {len(cut)}
    assert int((batch.labels != IGNORE_INDEX).sum()) == cut.num_answer_tokens > 0
    short = collator("qwen3_vl", whole.length - whole.prompt.tail - 1)
    assert "lose part of an image" in refused(lambda: short.encode(sample))
    language = collator("qwen3")
    assert "reads text only" in refused(lambda: language.encode(sample))


def test_settings_of_other_models_are_refused(mixed: Path) -> None:
    processor = TeacherProcessor(FAMILIES["qwen3_vl"].processor)
    options: dict[str, Any] = {"batch_size": 1, "max_length": 64}
    for wrong, expected in (({"batching": "packed"}, "packed"), ({"max_tiles": 4}, "resolution")):
        make = lambda wrong=wrong: StepLoader(open_corpus(mixed), processor, **options, **wrong)  # noqa: E731
        assert expected in refused(make)


def test_plain_text_is_scored_behind_its_first_token() -> None:
    make = collator("llama")
    batch, _ = make.collate([[make.encode(Sample("a", text="The answer is four."))]])
    labels = batch.labels[0].tolist()
    assert labels[0] == IGNORE_INDEX and labels[1:] == batch.inputs["input_ids"][0, 1:].tolist()


@pytest.mark.parametrize("orientation", (1, 6))
def test_pictures_are_upright_as_transformers_reads_them(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 12).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    source = write_set(tmp_path, asked("<image>\nWhat?", image="turned.jpg"))
    make = collator("qwen3_vl")
    encoded = make.encode(open_corpus(source)[0])
    batch, _ = make.collate([[encoded]])
    _, rows, columns = batch.inputs["image_grid_thw"][0].tolist()
    assert (rows > columns) == (orientation == 6)
    assert batch.num_tokens == len(encoded)


@pytest.mark.parametrize(("width", "height"), ((48, 32), (32, 32), (97, 89)))
def test_a_drawn_picture_has_its_own_size(width: int, height: int) -> None:
    (drawn,) = draw_pictures(Gradients(), [Drawing(width, height, (width, height))])
    assert drawn.size == (width, height)
    pixels = torch.from_numpy(np.array(drawn)).int()
    # Red grows to the right, green downwards.
    assert pixels[0, -1, 0] > 200 > 50 > pixels[0, 0, 0]
    assert pixels[-1, 0, 1] > 200 > 50 > pixels[0, 0, 1]
    assert (pixels[0].diff(dim=0)[:, 0] >= 0).all() and (pixels[:, 0].diff(dim=0)[:, 1] >= 0).all()


def test_data_check_takes_a_teacher_and_its_processor(mixed: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    save_teacher(FAMILIES["gemma3"], teacher)
    words = ("data", "check", str(mixed), "--model", str(teacher), "--max-bad-share", "1", "--json")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    # `<|im_end|>` and `<|image_pad|>` are words for Gemma, and a line has an aspect that it takes.
    assert [bad["name"] for bad in found["named"]] == [f"train.jsonl:{n}" for n in (2, 4, 7)]
    assert (found["samples"], found["with_images"], found["tiles"]) == (7, 2, 0)
