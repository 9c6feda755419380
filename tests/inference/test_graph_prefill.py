"""Prefill by graphs equals eager prefill, for any split and padding of a prompt."""

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
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_prefill, "CHUNK_TOKENS", (32, 16))
    monkeypatch.setattr(graph_prefill, "PAD_CHUNK_TO", 4)
    monkeypatch.setattr(graph_prefill, "MIN_CHUNK_COLUMNS", 4)
    monkeypatch.setattr(graph_prefill, "PAD_PROMPT_TO", 8)
    monkeypatch.setattr(graph_prefill, "MAX_GRAPH_TOKENS", 96)


def text(batch: int, length: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY - 10, (batch, length), generator=rng)


class Captures:
    """Stand-in for `GraphPool.capture`: returns the task itself and counts the captures."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.count += 1
        for _ in range(3):
            work()
        return work


@pytest.mark.parametrize(
    ("length", "padding", "batch", "shapes"),
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
def test_prompts_are_split_into_few_shapes(length, padding, batch, shapes) -> None:
    assert split_prompt(length, padding, batch) == shapes


@pytest.mark.parametrize("length", [1, 4, 7, 9, 16, 37, 45])
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ("mmmm", {}),
        ("mmmm", {"conv_width": 4, "d_skip": True}),
        ("dddm", {"conv_width": 1, "qk_norm": True}),
        ("dddd", {}),
    ],
)
def test_chunk_graphs_equal_eager_prefill(length: int, plan: str, options: dict) -> None:
    model = small_model(plan, **options).double()
    ids = text(2, length)
    eager, chunked = Generator(model), Generator(model)
    expected = eager.prefill(ids)
    expected_cache = eager._sequence.cache
    chunked.start(2, 64)
    cache = chunked._sequence.cache
    captures = Captures()
    graphs = ChunkGraphs(model, cache, captures)
    for _ in range(2):
        hidden = graphs.run(ids, None)
        logits = model.lm_head(model.model.norm(hidden))
        assert distance(logits, expected) < EXACT
        for a, b in zip(cache.tensors, expected_cache.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
        assert torch.equal(cache.counters, expected_cache.counters)
    assert captures.count > 0
    for one in (cache, expected_cache):
        one.ids.copy_(ids[:, 0])
        decode_step(one)
    assert distance(cache.logits, expected_cache.logits) < EXACT


def test_left_padded_rows_equal_single_rows() -> None:
    model = small_model("mdmd").double()
    rows = [prompt(0, n, n)[0] for n in (3, 41, 22)]
    ids, mask = pad_batch(rows)
    generator = Generator(model)
    generator.start(3, 64)
    graphs = ChunkGraphs(model, generator._sequence.cache, Captures())
    hidden = graphs.run(ids, mask.bool())
    for number, row in enumerate(rows):
        expected = model(row).logits[:, -1]
        logits = model.lm_head(model.model.norm(hidden[number : number + 1]))
        assert distance(logits, expected) < EXACT


@pytest.mark.parametrize(("shuffle", "uses_graphs"), [("pre", True), ("post", False)])
def test_images_use_graphs_if_both_stacks_have_the_same_columns(
    shuffle: str, uses_graphs: bool
) -> None:
    model = small_model("mmmm", shuffle).double()
    prompts = [prompt(tiles, text, text) for tiles, text in ((1, 5), (4, 20), (0, 9))]
    ids, mask = pad_batch([row for row, _ in prompts])
    pixels = join_pixels([given for _, given in prompts]).double()
    generator, captures = Generator(model), Captures()
    generator.start(3, 64)
    cache = generator._sequence.cache
    graphs = ChunkGraphs(model, cache, captures)
    for _ in range(2):
        logits = prefill(model, cache, ids, pixels, mask.bool(), None, graphs).clone()
        for number, (row, given) in enumerate(prompts):
            alone = model(row, None if given is None else given.double()).logits[:, -1]
            assert distance(logits[number : number + 1], alone) < EXACT
    assert (captures.count > 0) is uses_graphs


def test_graphs_are_captured_for_recurring_shapes() -> None:
    model = small_model("mmmm")
    generator = Generator(model)
    generator.start(1, 64)
    captures = Captures()
    graphs = ChunkGraphs(model, generator._sequence.cache, captures)
    graphs.run(text(1, 17), None)
    assert captures.count == 0
    graphs.run(text(1, 3), None)
    assert captures.count == 1
    graphs.run(text(1, 32 * cuda_graphs.MIN_CAPTURE_USES), None)
    assert captures.count == 2
    graphs.run(text(1, 32 * cuda_graphs.MIN_CAPTURE_USES + 1), None)
    assert captures.count == 2


def test_out_of_memory_in_a_capture_falls_back_to_eager_launches() -> None:
    model = small_model("mmmm").double()
    generator = Generator(model)
    generator.start(1, 64)
    asked = []

    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        asked.append(work)
        raise torch.OutOfMemoryError("no room")

    graphs = ChunkGraphs(model, generator._sequence.cache, refuse)
    ids = text(1, 7)
    for _ in range(3):
        hidden = graphs.run(ids, None)
    assert len(asked) == 1
    assert distance(model.lm_head(model.model.norm(hidden)), model(ids).logits[:, -1]) < EXACT


def test_supported_mixers() -> None:
    for plan, options, by_chunks, whole in (
        ("mmmm", {}, True, True),
        ("mmam", {}, False, True),
        ("aaaa", {}, False, True),
        ("mmam", {"rope": True}, False, False),
        ("mmmm", {"qk_norm": True}, True, True),
        ("mdmd", {}, True, True),
    ):
        packed = Generator(small_model(plan, **options))._packed
        assert supports_chunk_graphs(packed) is by_chunks
        assert supports_prompt_graphs(packed) is whole


@pytest.mark.parametrize("plan", ["aaaa", "mmam", "adam"])
@pytest.mark.parametrize(
    "options", [{}, {"conv_width": 4, "d_skip": True}, {"conv_width": 1, "qk_norm": True}]
)
@pytest.mark.parametrize("tiles", [0, 2])
def test_prompt_graphs_equal_eager_prefill(plan: str, options: dict, tiles: int) -> None:
    model = small_model(plan, **options).double()
    eager, whole = Generator(model), Generator(model)
    whole.start(2, 64)
    cache, captures = whole._sequence.cache, Captures()
    graphs = PromptGraphs(model, cache, captures)
    # Shorter than the convolution, short, a multiple of the padding, long; then a known shape.
    for length in (1, 5, 8, 37, 3):
        rows = [prompt(tiles, length, seed) for seed in range(2)]
        ids = torch.cat([row for row, _ in rows])
        pixels = None if tiles == 0 else join_pixels([given for _, given in rows]).double()
        expected = eager.prefill(ids, pixels, capacity=64)
        expected_cache = eager._sequence.cache
        assert graphs.accepts(ids.shape[1], None)
        assert distance(prefill(model, cache, ids, pixels, None, None, graphs), expected) < EXACT
        assert torch.equal(cache.counters, expected_cache.counters)
        for _ in range(2 * graph_prefill.PAD_PROMPT_TO):
            for one in (cache, expected_cache):
                one.ids.copy_(ids[:, 0])
                decode_step(one)
            assert distance(cache.logits, expected_cache.logits) < EXACT
    assert captures.count > 0


@pytest.mark.parametrize("plan", ["mmaa", "mmam", "mmmm", "amam"])
def test_padding_stays_finite_with_normalize_embedding_output(plan: str) -> None:
    model = small_model(plan).double()
    model.config.normalize_embedding_output = True
    generator = Generator(model)
    generator.start(1, 64)
    cache = generator._sequence.cache
    graph_class = ChunkGraphs if plan == "mmmm" else PromptGraphs
    graphs = graph_class(model, cache, Captures())
    for length in (3, 37):
        ids = text(1, length)
        hidden = graphs.run(ids, None)
        logits = model.lm_head(model.model.norm(hidden))
        assert distance(logits, model(ids).logits[:, -1]) < EXACT
        assert all(bool(memory.isfinite().all()) for memory in cache.tensors)


def test_prompts_that_prompt_graphs_refuse() -> None:
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}
    for options, longest in (({}, 48), (scaled, 20)):
        generator = Generator(small_model("amam", **options))
        generator.start(2, 64)
        graphs = PromptGraphs(generator.model, generator._sequence.cache, Captures())
        assert graphs.accepts(longest, None)
        assert not graphs.accepts(longest + 1, None)
        assert not graphs.accepts(4, torch.ones(2, 4, dtype=torch.bool))


def test_dynamic_ntk_prompts_within_the_trained_length() -> None:
    scaled = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}
    model = small_model("amam", **scaled).double()
    generator = Generator(model)
    generator.start(1, 64)
    graphs = PromptGraphs(model, generator._sequence.cache, Captures())
    # The graph has 24 columns, more than the trained 20; the prompt has 19 tokens.
    hidden = graphs.run(text(1, 19), None)
    logits = model.lm_head(model.model.norm(hidden))
    assert distance(logits, model(text(1, 19)).logits[:, -1]) < EXACT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
@pytest.mark.parametrize("plan", ["mmmm", "amam", "aaaa"])
@pytest.mark.parametrize("tiles", [0, 3])
@pytest.mark.parametrize("length", [5, 37, 200])
def test_captured_graphs_give_the_tokens_of_the_model(length: int, tiles: int, plan: str) -> None:
    model = small_model(plan).cuda()
    rows = [prompt(tiles, length, seed) for seed in range(2)]
    ids = torch.cat([row for row, _ in rows]).cuda()
    pixels = join_pixels([given for _, given in rows])
    pixels = None if pixels is None else pixels.cuda()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    # Without a mask, `generate` would mask ids equal to the padding id.
    mask = torch.ones_like(ids)
    expected = model.generate(ids, pixel_values=pixels, attention_mask=mask, **options)
    generator = Generator(model)
    for _ in range(3):
        found = generator.generate(ids, pixels, max_new_tokens=8, eos=())
        assert torch.equal(found, expected[:, ids.shape[1] :])
    assert generator._pool._prefills
