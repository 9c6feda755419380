"""Corpora of plug-ins: specs, streams, fingerprints, pictures that the training process draws."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from mmmamba_cli.data import (
    HELD_OUT,
    CorpusSpec,
    CountOption,
    Drawing,
    FlagOption,
    NumberOption,
    RangeOption,
    Sample,
    StepBatches,
    StepLoader,
    check_data,
    fingerprint,
    generated_corpus,
    open_corpus,
    read_options,
)
from mmmamba_cli.data.generated_corpus import parse_spec
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import HolisticVLMProcessor, Tiling, count_tiles

OPTIONS = {
    "share": NumberOption(0.5),
    "sizes": RangeOption((1, 3), 1, 9),
    "flag": FlagOption(False),
    "count": CountOption(1, 1, 4),
}


class Squares:
    """Conversations about a square of one grey, every second one without a picture."""

    def __init__(self, spec: CorpusSpec, seed: int, stream: str):
        self.identity = f"1 {sorted(read_options(spec, OPTIONS).items())}"
        self.start = f"{seed} {stream}"
        self.lost_tiles = 0

    def sample(self, index: int, name: str) -> Sample:
        rng = Random(f"{self.start} {index}")
        grey, words = rng.randrange(256), " ".join("apples" for _ in range(rng.randint(1, 9)))
        drawings = (Drawing(90, 45, grey),) if index % 2 else ()
        question = "<image>\nWhat is it?" if drawings else f"What is {grey}?"
        return Sample(name, _turns(question, words), images=drawings)

    def stack(self, drawings: Sequence[Drawing], tiling: Tiling) -> Any:
        counts = [count_tiles(one.width, one.height, tiling) for one in drawings]
        greys = [one.layout for one in drawings]
        return torch.tensor(greys).repeat_interleave(torch.tensor(counts)), tiling.image_size

    def to_pixels(self, layouts: Any, device: torch.device) -> Tensor:
        greys, side = layouts
        pixels = greys.to(device).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, side, side)
        return pixels[self.lost_tiles :]


def _turns(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


@pytest.fixture(autouse=True)
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generated_corpus, "entry_points", lambda group: [("squares", lambda: Squares)]
    )


def loader(processor: HolisticVLMProcessor, spec: str = "squares:", **options: Any) -> StepLoader:
    seed = options.pop("corpus_seed", 0)
    given = {"batch_size": 6, "max_length": 400, "max_tiles": 2, "batching": "packed", **options}
    return StepLoader(open_corpus(spec, seed=seed, stream="s"), processor, **given)


def ids_and_pixels(steps: Sequence[StepBatches]) -> list[tuple[Tensor, Tensor]]:
    """Ids and drawn pixels of each micro batch; no pixels become an empty tensor."""
    found = []
    for step in steps:
        for micro in (micro.to("cpu") for micro in step.micro_batches):
            assert micro.drawings is None
            pixels = micro.pixel_values
            found.append((micro.input_ids, torch.empty(0) if pixels is None else pixels))
    return found


def test_specs() -> None:
    spec = parse_spec("scenes:lessons?alter=1&long=0.33")
    assert spec is not None
    assert (spec.name, spec.kind) == ("scenes", "lessons")
    assert spec.options == {"alter": "1", "long": "0.33"}
    assert parse_spec("part-{000..099}.tar") is None
    assert parse_spec("data/train.jsonl") is None
    assert parse_spec("C:\\data\\train.jsonl") is None
    with pytest.raises(DataError, match="option 'long' has no value"):
        parse_spec("scenes:lessons?long")
    with pytest.raises(DataError, match="option 'long' is given twice"):
        parse_spec("scenes:lessons?long=1&long=0")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("circles:", "no installed package has a corpus 'circles'"),
        ("squares:?colour=1", "squares: has no option 'colour'"),
        ("squares:?share=2", "share is '2', expected a number from 0 to 1"),
        ("squares:?share=nan", "share is 'nan', expected a number"),
        ("squares:?sizes=3-1", "sizes is '3-1', expected A-B, whole numbers from 1 to 9"),
        ("squares:?sizes=2", "sizes is '2', expected A-B"),
        ("squares:?flag=yes", "flag is 'yes', expected 0 or 1"),
        ("squares:?count=5", "count is '5', expected a whole number from 1 to 4"),
        ("squares:?samples=0", "samples is '0', expected a whole number from 1"),
    ],
)
def test_specs_that_are_refused(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_corpus(source)
    assert message in caught.value.message
    if "colour" in message:
        assert "share: a number from 0 to 1; sizes: A-B" in str(caught.value.hint)


def test_lengths_and_fingerprints() -> None:
    endless, held_out = open_corpus("squares:"), open_corpus("squares:", stream=HELD_OUT)
    assert len(held_out) == 512
    assert len(endless) > 10**9
    assert len(open_corpus("squares:?samples=7", stream=HELD_OUT)) == 7
    assert endless[5].name == endless.name(5) == "squares:#5"
    # The seed is a setting of its own; the spelling of a default is no other corpus.
    same = fingerprint(open_corpus("squares:?share=0.5", seed=9))
    assert fingerprint(endless) == same
    assert fingerprint(open_corpus("squares:?share=0.6")) != same


def test_streams_and_seeds_have_other_samples() -> None:
    def texts(seed: int, stream: str) -> set[str]:
        corpus = open_corpus("squares:", seed=seed, stream=stream)
        return {str(corpus[index].messages) for index in range(0, 40, 2)}

    assert texts(0, "stage1") == texts(0, "stage1")
    assert texts(0, "stage1") != texts(0, "stage2") != texts(1, "stage2")
    assert texts(0, HELD_OUT) != texts(0, "stage1")


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
def test_workers_and_resuming_change_nothing(
    batching: str, processor: HolisticVLMProcessor
) -> None:
    whole = ids_and_pixels(list(loader(processor, batching=batching).steps(0, 4)))
    again = ids_and_pixels(list(loader(processor, batching=batching, workers=2).steps(1, 4)))
    for one, two in zip(whole[1:], again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(len(pixels) for _, pixels in whole)
    assert not torch.equal(whole[0][0], whole[1][0])


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_processes_split_the_same_batch(batching: str, processor: HolisticVLMProcessor) -> None:
    (_, whole), *_ = ids_and_pixels([loader(processor, batching=batching).step(3)])
    parts = [
        pixels
        for rank in range(2)
        for _, pixels in ids_and_pixels(
            [loader(processor, batching=batching, rank=rank, world_size=2).step(3)]
        )
    ]
    assert len(whole) == 3 * 3
    assert torch.equal(torch.cat([part for part in parts if len(part)]), whole)


def test_a_finite_corpus_is_shuffled_in_each_pass(processor: HolisticVLMProcessor) -> None:
    source = loader(processor, "squares:?samples=12", batching="padded")
    names = [m.names for step in source.steps(0, 4) for m in step.micro_batches]
    one, two = names[0] + names[1], names[2] + names[3]
    assert sorted(one) == sorted(two) == sorted(f"squares:#{i}" for i in range(12))
    assert one != two


def test_the_loader_sends_layouts_and_no_function(processor: HolisticVLMProcessor) -> None:
    batches = loader(processor).prepare(0)
    (micro,) = batches.micro_batches
    assert micro.drawings is not None
    assert micro.drawings.to_pixels is None
    assert micro.pixel_values is None
    assert len(pickle.dumps(micro.drawings)) < 2000


def test_pixels_of_another_shape_are_refused(processor: HolisticVLMProcessor) -> None:
    source = loader(processor)
    source.corpus.generator.lost_tiles = 1  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"the corpus drew pixels \(8, 3, "):
        source.step(0).micro_batches[0].to("cpu")


def test_a_check_reads_a_part_of_an_endless_corpus(processor: HolisticVLMProcessor) -> None:
    corpus = open_corpus("squares:")
    report = check_data(corpus, processor, 300, limit=20)
    assert (report.samples, report.images, report.bad) == (20, 10, [])
    assert check_data(corpus, processor, 300, 2, decode=False).samples == 1000
    corpus.generator.lost_tiles = 1  # type: ignore[attr-defined]
    report = check_data(corpus, processor, 300, limit=4)
    assert [one.name for one in report.bad] == ["squares:#1", "squares:#3"]
