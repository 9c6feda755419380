"""Parts of a prompt, as graphs read them: nothing depends on how it is cut or padded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import VOCABULARY, distance, join_pixels, pad_batch, prompt, small_model

from mmmamba_cli.inference import Generator, cuda_graphs, graph_prefill
from mmmamba_cli.inference.decode_step import decode_step
from mmmamba_cli.inference.graph_prefill import (
    ChunkGraphs,
    ChunkShape,
    PromptGraphs,
    split_prompt,
    supports_chunk_graphs,
    supports_prompt_graphs,
)
from mmmamba_cli.inference.prefill import prefill

EXACT = 1e-10


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_prefill, "CHUNK_TOKENS", (32, 16))
    monkeypatch.setattr(graph_prefill, "PAD_CHUNK_TO", 4)
    monkeypatch.setattr(graph_prefill, "MIN_CHUNK_COLUMNS", 4)
    monkeypatch.setattr(graph_prefill, "PAD_PROMPT_TO", 8)
    monkeypatch.setattr(graph_prefill, "MAX_GRAPH_TOKENS", 96)


def text(batch: int, length: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY - 10, (batch, length), generator=rng)


class Captures:
    """Stands for a graph pool: runs work as it is, and says how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.count += 1
        for _ in range(3):
            work()
        return work


@pytest.mark.parametrize(
    ("length", "padding", "batch", "kinds"),
    [
        (1, 0, 1, [ChunkShape(4, True)]),
        (8, 0, 1, [ChunkShape(8, True)]),
        (9, 0, 1, [ChunkShape(12, True)]),
        (16, 0, 1, [ChunkShape(16, False)]),
        (16, 1, 1, [ChunkShape(16, True)]),
        (37, 0, 1, [ChunkShape(8, True), ChunkShape(32, False)]),
        (53, 7, 1, [ChunkShape(8, True), ChunkShape(16, True), ChunkShape(32, False)]),
        (53, 17, 1, [ChunkShape(8, True), ChunkShape(16, True), ChunkShape(32, False)]),
        (53, 27, 1, [ChunkShape(8, True), ChunkShape(16, True), ChunkShape(32, True)]),
        (45, 4, 1, [ChunkShape(16, True), ChunkShape(32, False)]),
        (20, 0, 2, [ChunkShape(4, True), ChunkShape(16, False)]),
        (9, 0, 3, [ChunkShape(4, True), ChunkShape(8, False)]),
        (80, 0, 1, [ChunkShape(16, False), ChunkShape(32, False), ChunkShape(32, False)]),
    ],
)
def test_prompts_are_cut_into_few_kinds(length, padding, batch, kinds) -> None:
    assert split_prompt(length, padding, batch) == kinds


@pytest.mark.parametrize("length", [1, 4, 7, 9, 16, 37, 45])
@pytest.mark.parametrize("options", [{}, {"conv_width": 4, "d_skip": True}, {"conv_width": 1}])
def test_logits_and_memory_are_those_of_other_parts(length: int, options: dict) -> None:
    model = small_model("mmmm", **options).double()
    ids = text(2, length)
    plain, parted = Generator(model), Generator(model)
    expected = plain.prefill(ids)
    states = plain._sequence.cache
    parted.start(2, 64)
    mine = parted._sequence.cache
    captures = Captures()
    reader = ChunkGraphs(model, mine, captures)
    for _ in range(2):
        hidden = reader.run(ids, None)
        logits = model.lm_head(model.model.norm(hidden))
        assert distance(logits, expected) < EXACT
        for a, b in zip(mine.tensors, states.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
        assert torch.equal(mine.counters, states.counters)
    assert captures.count > 0
    for one in (mine, states):
        one.ids.copy_(ids[:, 0])
        decode_step(one)
    assert distance(mine.logits, states.logits) < EXACT


def test_rows_padded_on_the_left_are_as_alone() -> None:
    model = small_model("mmmm").double()
    rows = [prompt(0, n, n)[0] for n in (3, 41, 22)]
    ids, mask = pad_batch(rows)
    generator = Generator(model)
    generator.start(3, 64)
    reader = ChunkGraphs(model, generator._sequence.cache, Captures())
    hidden = reader.run(ids, mask.bool())
    for number, row in enumerate(rows):
        expected = model(row).logits[:, -1]
        logits = model.lm_head(model.model.norm(hidden[number : number + 1]))
        assert distance(logits, expected) < EXACT


@pytest.mark.parametrize(("shuffle", "is_read_so"), [("pre", True), ("post", False)])
def test_pictures_are_read_where_both_stacks_see_as_many_columns(
    shuffle: str, is_read_so: bool
) -> None:
    model = small_model("mmmm", shuffle).double()
    prompts = [prompt(tiles, text, text) for tiles, text in ((1, 5), (4, 20), (0, 9))]
    ids, mask = pad_batch([row for row, _ in prompts])
    pixels = join_pixels([given for _, given in prompts]).double()
    generator, captures = Generator(model), Captures()
    generator.start(3, 64)
    states = generator._sequence.cache
    reader = ChunkGraphs(model, states, captures)
    for _ in range(2):
        logits = prefill(model, states, ids, pixels, mask.bool(), None, reader).clone()
        for number, (row, given) in enumerate(prompts):
            alone = model(row, None if given is None else given.double()).logits[:, -1]
            assert distance(logits[number : number + 1], alone) < EXACT
    assert (captures.count > 0) is is_read_so


def test_graphs_are_made_for_what_comes_often() -> None:
    model = small_model("mmmm")
    generator = Generator(model)
    generator.start(1, 64)
    captures = Captures()
    reader = ChunkGraphs(model, generator._sequence.cache, captures)
    reader.run(text(1, 17), None)
    assert captures.count == 0
    reader.run(text(1, 3), None)
    assert captures.count == 1
    reader.run(text(1, 32 * cuda_graphs.MIN_CAPTURE_USES), None)
    assert captures.count == 2
    reader.run(text(1, 32 * cuda_graphs.MIN_CAPTURE_USES + 1), None)
    assert captures.count == 2


def test_without_memory_for_a_graph_parts_are_launched_one_by_one() -> None:
    model = small_model("mmmm").double()
    generator = Generator(model)
    generator.start(1, 64)
    asked = []

    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        asked.append(work)
        raise torch.OutOfMemoryError("no room")

    reader = ChunkGraphs(model, generator._sequence.cache, refuse)
    ids = text(1, 7)
    for _ in range(3):
        hidden = reader.run(ids, None)
    assert len(asked) == 1
    assert distance(model.lm_head(model.model.norm(hidden)), model(ids).logits[:, -1]) < EXACT


def test_only_plain_mixers_are_read_so() -> None:
    for plan, options, in_parts, as_a_whole in (
        ("mmmm", {}, True, True),
        ("mmam", {}, False, True),
        ("aaaa", {}, False, True),
        ("mmam", {"rope": True}, False, False),
        ("mmmm", {"qk_norm": True}, False, False),
    ):
        model_plan = Generator(small_model(plan, **options))._packed
        assert supports_chunk_graphs(model_plan) is in_parts
        assert supports_prompt_graphs(model_plan) is as_a_whole


@pytest.mark.parametrize("plan", ["aaaa", "mmam", "amam"])
@pytest.mark.parametrize("options", [{}, {"conv_width": 4, "d_skip": True}, {"conv_width": 1}])
@pytest.mark.parametrize("tiles", [0, 2])
def test_with_attention_prompts_are_read_whole(plan: str, options: dict, tiles: int) -> None:
    model = small_model(plan, **options).double()
    plain, wholly = Generator(model), Generator(model)
    wholly.start(2, 64)
    mine, captures = wholly._sequence.cache, Captures()
    reader = PromptGraphs(model, mine, captures)
    # Fewer than the convolution is wide, a few, a round number, many; then as one already known.
    for length in (1, 5, 8, 37, 3):
        rows = [prompt(tiles, length, seed) for seed in range(2)]
        ids = torch.cat([row for row, _ in rows])
        pixels = None if tiles == 0 else join_pixels([given for _, given in rows]).double()
        expected = plain.prefill(ids, pixels, capacity=64)
        states = plain._sequence.cache
        assert reader.accepts(ids.shape[1], None)
        assert distance(prefill(model, mine, ids, pixels, None, None, reader), expected) < EXACT
        assert torch.equal(mine.counters, states.counters)
        for _ in range(2 * graph_prefill.PAD_PROMPT_TO):
            for one in (mine, states):
                one.ids.copy_(ids[:, 0])
                decode_step(one)
            assert distance(mine.logits, states.logits) < EXACT
    assert captures.count > 0


@pytest.mark.parametrize("plan", ["mmaa", "mmam", "mmmm", "amam"])
def test_a_normed_embedding_output_makes_nothing_of_padding(plan: str) -> None:
    model = small_model(plan).double()
    model.config.normalize_embedding_output = True
    generator = Generator(model)
    generator.start(1, 64)
    states = generator._sequence.cache
    kind = ChunkGraphs if plan == "mmmm" else PromptGraphs
    reader = kind(model, states, Captures())
    for length in (3, 37):
        ids = text(1, length)
        hidden = reader.run(ids, None)
        logits = model.lm_head(model.model.norm(hidden))
        assert distance(logits, model(ids).logits[:, -1]) < EXACT
        assert all(bool(memory.isfinite().all()) for memory in states.tensors)


def test_what_is_not_read_whole() -> None:
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}
    for options, longest in (({}, 48), (scaled, 20)):
        generator = Generator(small_model("amam", **options))
        generator.start(2, 64)
        reader = PromptGraphs(generator.model, generator._sequence.cache, Captures())
        assert reader.accepts(longest, None)
        assert not reader.accepts(longest + 1, None)
        assert not reader.accepts(4, torch.ones(2, 4, dtype=torch.bool))


def test_scaled_angles_are_those_of_short_prompts() -> None:
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}
    model = small_model("amam", **scaled).double()
    generator = Generator(model)
    generator.start(1, 64)
    reader = PromptGraphs(model, generator._sequence.cache, Captures())
    # 24 columns are more than are given the angles of short prompts, 19 tokens are not.
    hidden = reader.run(text(1, 19), None)
    logits = model.lm_head(model.model.norm(hidden))
    assert distance(logits, model(text(1, 19)).logits[:, -1]) < EXACT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs want a GPU")
@pytest.mark.parametrize("plan", ["mmmm", "amam", "aaaa"])
@pytest.mark.parametrize("tiles", [0, 3])
@pytest.mark.parametrize("length", [5, 37, 200])
def test_graphs_give_the_tokens_of_the_model(length: int, tiles: int, plan: str) -> None:
    model = small_model(plan).cuda()
    rows = [prompt(tiles, length, seed) for seed in range(2)]
    ids = torch.cat([row for row, _ in rows]).cuda()
    pixels = join_pixels([given for _, given in rows])
    pixels = None if pixels is None else pixels.cuda()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    # Without a mask, ids that are also that of padding would be left out.
    mask = torch.ones_like(ids)
    expected = model.generate(ids, pixel_values=pixels, attention_mask=mask, **options)
    generator = Generator(model)
    for _ in range(3):
        found = generator.generate(ids, pixels, max_new_tokens=8, eos=())
        assert torch.equal(found, expected[:, ids.shape[1] :])
    assert generator._pool._prefills
