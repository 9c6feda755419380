"""Assignment of rows to processes, and errors of worker processes."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from isolated_process import ROOT, run_isolated

from mmmamba_cli.data import EncodedSample, Sample, StepBatches, StepLoader, open_corpus
from mmmamba_cli.data.dataset import CorpusPart
from mmmamba_cli.data.holistic_collator import Row, assign_rows
from mmmamba_cli.errors import CheckpointError
from mmmamba_cli.processing import HolisticVLMProcessor


def rows_of(lengths: list[int]) -> list[Row]:
    return [
        [EncodedSample(str(n), [1] * length, [True] * length)] for n, length in enumerate(lengths)
    ]


def area(lengths: list[int]) -> int:
    """Tokens of a micro batch, with padding."""
    return len(lengths) * max(lengths, default=0)


def cuts(lengths: list[int], parts: int) -> Iterator[list[list[int]]]:
    for places in combinations(range(1, len(lengths)), parts - 1):
        bounds = (0, *places, len(lengths))
        yield [lengths[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=9), st.integers(1, 3), st.integers(1, 2))
def test_the_largest_micro_batch_is_as_small_as_can_be(
    lengths: list[int], world: int, accumulation: int
) -> None:
    """Optimal among all splits; no row is lost or moved, and no process is idle needlessly."""
    parts = world * accumulation
    assigned = [assign_rows(rows_of(lengths), rank, world, accumulation) for rank in range(world)]
    in_order = [assigned[part % world][part // world] for part in range(parts)]
    found = [[len(row[0]) for row in part] for part in in_order]
    assert [length for part in found for length in part] == lengths
    assert sum(map(bool, found)) == min(parts, len(lengths))
    ways = list(cuts(lengths, parts)) if len(lengths) >= parts else [[[n] for n in lengths]]
    assert max(map(area, found)) == min(max(map(area, way), default=0) for way in ways)


def real_rows(steps: list[StepBatches]) -> list[tuple[int, ...]]:
    """The ids of each row without its padding."""
    found = []
    for micro in (micro for step in steps for micro in step.micro_batches if micro.num_samples):
        for r, ids in enumerate(micro.input_ids):
            real = slice(None) if micro.attention_mask is None else micro.attention_mask[r]
            found.append(tuple(ids[real].tolist()))
    return sorted(found)


@pytest.mark.parametrize("batching", ["padded", "bucketed", "packed"])
def test_rows_do_not_depend_on_the_processes(
    batching: str, folder: Path, processor: HolisticVLMProcessor
) -> None:
    def shares(world: int, accumulation: int) -> list[StepBatches]:
        corpus = open_corpus(folder / "train.jsonl", folder)
        loaders = [
            StepLoader(
                corpus,
                processor,
                batch_size=12,
                accumulation=accumulation,
                max_length=500,
                batching=batching,
                rank=rank,
                world_size=world,
            )
            for rank in range(world)
        ]
        return [loader.step(1) for loader in loaders]

    alone = shares(1, 1)
    for world, accumulation in ((1, 4), (2, 1), (3, 2), (8, 2)):
        assert real_rows(shares(world, accumulation)) == real_rows(alone)
    tiles = [m.pixel_values for share in shares(3, 2) for m in share.micro_batches]
    total = sum(len(t) for t in tiles if t is not None)
    assert alone[0].micro_batches[0].pixel_values is not None
    assert total == len(alone[0].micro_batches[0].pixel_values) > 0


def test_a_loader_can_be_pickled(folder: Path, processor: HolisticVLMProcessor) -> None:
    """Workers that are not forked receive it pickled."""
    corpus = open_corpus(folder / "train.jsonl", folder)
    loader = StepLoader(corpus, processor, batch_size=5, max_length=400)
    first = loader.step(0)
    sent = pickle.loads(pickle.dumps(loader)).step(0)
    assert sent.micro_batches[0].names == first.micro_batches[0].names
    assert torch.equal(sent.micro_batches[0].input_ids, first.micro_batches[0].input_ids)


class Failing:
    """A corpus that raises `error` from sample 3 on."""

    parts = (CorpusPart("failing", 8),)

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        if index >= 3:
            raise self.error
        return Sample(self.name(index), text="the cat")

    def name(self, index: int) -> str:
        return f"failing:{index + 1}"


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("a bug"), CheckpointError("no template", "take another")]
)
def test_errors_of_workers_are_raised(
    error: Exception, workers: int, processor: HolisticVLMProcessor
) -> None:
    """A bug keeps its exception type; a user error keeps its message, without the traceback."""
    options: dict[str, Any] = {"max_length": 50, "shuffle": False, "workers": workers}
    loader = StepLoader(Failing(error), processor, batch_size=1, **options)
    got = []
    with pytest.raises(type(error), match=r"a bug|no template") as caught:
        for batches in loader.steps(0, 8):
            got.append(batches.step)
    assert got == [0, 1, 2]
    if isinstance(error, CheckpointError):
        assert str(caught.value) == "no template (take another)"


def test_loader_processes_are_forks_in_a_spawned_process(
    monkeypatch: pytest.MonkeyPatch, processor: HolisticVLMProcessor
) -> None:
    """A cell of a plan and a process of --gpus are spawned; spawn is the default in them.

    A spawned loader process would get the corpus as a pickle.
    """
    corpus: Any = Failing(ZeroDivisionError("a bug"))
    corpus.cannot_be_pickled = lambda: None
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    loader = StepLoader(corpus, processor, batch_size=1, max_length=50, shuffle=False, workers=1)
    assert [batches.step for batches in loader.steps(0, 3)] == [0, 1, 2]


# Two programs as forks of one that has imported everything.
ENDING = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from test_sharing import Failing, Silent
from mmmamba_cli.data import StepLoader

def train(corpus, where):
    steps = StepLoader(
        corpus, Silent([1, 2]), batch_size=1, max_length=9, shuffle=False, workers=2
    ).steps(0, 8)
    for batches in steps:
        print(batches.step, flush=True)
        if batches.step == 1 and where == "here":
            raise ZeroDivisionError("a bug")

for where in ("here", "in a worker"):
    if not os.fork():
        signal.alarm(120)
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(f"{sys.argv[1]}/{where}.{name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
        train(Failing(ZeroDivisionError("a bug")), where)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_an_error_ends_the_program(tmp_path: Path) -> None:
    """Workers do not prevent exit, although they ignore signals and the traceback holds batches."""
    codes = run_isolated(ENDING, tmp_path, *filter(None, sys.path), package=ROOT)
    assert codes.split() == ["1", "1"]
    for where, steps in (("here", ["0", "1"]), ("in a worker", ["0", "1", "2"])):
        assert "ZeroDivisionError: a bug" in (tmp_path / f"{where}.err").read_text()
        assert (tmp_path / f"{where}.out").read_text().split() == steps


class Silent:
    """A text-only processor that returns the same tokens for every input."""

    pad_token_id, image_processor = 0, None

    def __init__(self, ids: list[int]):
        self.ids = ids

    def text_ids(self, text: str) -> list[int]:
        return self.ids

    def conversation_ids(self, messages: Any, num_tiles: Any) -> tuple[list[int], list[bool]]:
        return self.ids, [False] * len(self.ids)


def test_a_sample_without_tokens_is_bad() -> None:
    corpus = Failing(ZeroDivisionError())
    loader = StepLoader(corpus, Silent([]), batch_size=3, max_length=50, shuffle=False)
    step = loader.step(0)
    assert [sample.name for sample in step.bad] == ["failing:1", "failing:2", "failing:3"]
    assert step.micro_batches[0].num_samples == 0


def test_ids_and_mask_by_hand(processor: HolisticVLMProcessor) -> None:
    """Expected tokens written by hand; `<|im_end|>` typed in an answer does not end it."""
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<image>\nWho?"},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Red?"},
        {"role": "assistant", "content": "<|im_end|> no"},
    ]
    expected = [
        ("<s> <|im_start|> ▁s y st em <0x0A> <0x42> e ▁ k in d . <|im_end|>", False),
        ("<|im_start|> ▁us er <0x0A> <img>" + " <IMG_CONTEXT>" * 8 + " </img>", False),
        ("▁ <0x0A> Wh o ? <|im_end|> <|im_start|> ▁assistant <0x0A>", False),
        ("A ▁c at . <|im_end|>", True),
        ("<|im_start|> ▁us er <0x0A> Re d ? <|im_end|> <|im_start|> ▁assistant <0x0A>", False),
        ("< <0x7C> i m <0x5F> en d <0x7C> > ▁no <|im_end|>", True),
    ]
    ids, is_answer = processor.conversation_ids(messages, [2])
    tokens = [token for text, _ in expected for token in text.split(" ")]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == tokens
    assert is_answer == [mark for text, mark in expected for _ in text.split(" ")]
    # The end of a turn is the special token; the typed one is split into characters.
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
