"""A Generator gives the tokens and logits of the model, for any prompt, chunk size and padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import IMAGE_ID, VOCABULARY, distance, join_pixels, pad_batch, prompt, small_model

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.inference import Generator, Settings
from mmmamba_cli.inference.mixers.attention import KVCache
from mmmamba_cli.inference.static_cache import StaticCache, kv_nbytes
from mmmamba_cli.model import new_cache
from mmmamba_cli.ops import BACKENDS

NEW = 8
# Differences by the order of summation, in fp64 and in fp32.
EXACT, CLOSE = 1e-10, 2e-5
MIXERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"conv_width": 4, "d_skip": True},
    "narrow": {"conv_width": 1},
    "normed": {"qk_norm": True},
    "rotated": {"rope": True, "conv_width": 3},
}


def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Three prompts of unequal length, with two tiles, none and one, padded on the left."""
    inputs = [prompt(2, 6, 0), prompt(0, 5, 1), prompt(1, 9, 2)]
    ids, mask = pad_batch([row for row, _ in inputs])
    return ids, {"pixel_values": join_pixels([p for _, p in inputs]), "attention_mask": mask}


def greedy(model: Any, ids: torch.Tensor, new: int = NEW, **inputs: Any) -> torch.Tensor:
    """The tokens of `model.generate`."""
    tokens = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **inputs)
    return tokens[:, ids.shape[1] :]


@pytest.mark.parametrize("shuffle", ["pre", "post"])
@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
@pytest.mark.parametrize("scaled", [False, True])
def test_tokens_equal_model_generate(shuffle: str, plan: str, scaled: bool) -> None:
    options: dict[str, Any] = {}
    if scaled:
        options = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    model = small_model(plan, shuffle, **options)
    ids, inputs = batch()
    expected = greedy(model, ids, **inputs)
    generator = Generator(model)
    assert torch.equal(generator.generate(ids, **inputs, max_new_tokens=NEW), expected)
    assert torch.equal(generator.generate(ids, **inputs, max_new_tokens=NEW, chunk=5), expected)
    streamed = list(generator.stream(ids, **inputs, max_new_tokens=NEW))
    assert streamed == expected.T.tolist()
    assert torch.equal(greedy(model, ids, **inputs), expected)


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("plan", ["mmmm", "amam", "ddmd"])
def test_logits_equal_the_model(mixer: str, plan: str) -> None:
    # In fp64: small gates amplify rounding errors of fp32.
    model = small_model(plan, "post", **MIXERS[mixer]).double()
    ids, inputs = batch()
    mask = inputs["attention_mask"]
    assert mask is not None
    cache = new_cache(model.config)
    expected = model(ids, **inputs, past_key_values=cache).logits[:, -1]
    generator = Generator(model)
    found = generator.prefill(ids, **inputs)
    for _ in range(2 * NEW):
        assert distance(found, expected) < EXACT
        token = expected.argmax(-1, keepdim=True)
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        expected = model(token, attention_mask=mask, past_key_values=cache).logits[:, -1]
        found = generator.step(token)


@pytest.mark.parametrize("plan", ["aaaa", "mmmm", "amam"])
@pytest.mark.parametrize("options", [{}, {"rope": True, "qk_norm": True}], ids=["plain", "own"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunk_size_does_not_change_the_result(
    plan: str, chunk: int, options: dict[str, bool]
) -> None:
    """Mixers with a norm or RoPE on q and k run by the model's modules, chunk by chunk."""
    model = small_model(plan, "pre", **options)
    ids, inputs = batch()
    generator = Generator(model)
    whole = generator.prefill(ids, **inputs).clone()
    assert distance(generator.prefill(ids, **inputs, chunk=chunk), whole) < CLOSE
    text, mask = pad_batch([prompt(0, 12)[0], prompt(0, 5, 1)[0], prompt(0, 9, 2)[0]])
    whole = model(text, attention_mask=mask).logits[:, -1]
    found = generator.prefill(text, attention_mask=mask, chunk=chunk)
    assert distance(found, whole) < CLOSE
    tokens = greedy(model, text, attention_mask=mask)
    found = generator.generate(text, attention_mask=mask, chunk=chunk, max_new_tokens=NEW)
    assert torch.equal(found, tokens)


def test_all_chunks_use_the_rope_frequencies_of_the_whole_prompt() -> None:
    model = small_model(
        "aaaa", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=8
    )
    text, mask = pad_batch([prompt(0, 30)[0], prompt(0, 17, 1)[0]])
    whole = model(text, attention_mask=mask).logits[:, -1]
    found = Generator(model).prefill(text, attention_mask=mask, chunk=4)
    assert distance(found, whole) < CLOSE


def test_missing_pixel_values_are_refused_with_chunks() -> None:
    ids, _ = prompt(1, 6)
    with pytest.raises(DataError, match="no pixel_values were given"):
        Generator(small_model("amam")).prefill(ids, chunk=2)


def test_a_previous_prompt_does_not_change_the_next_answer() -> None:
    model = small_model("amam")
    generator = Generator(model)
    ids, inputs = batch()
    first, _ = prompt(0, 7, 1)
    expected = generator.generate(first, max_new_tokens=NEW)
    generator.generate(ids, **inputs, max_new_tokens=NEW)
    generator.generate(prompt(0, 9, 3)[0], max_new_tokens=NEW)
    assert torch.equal(generator.generate(first, max_new_tokens=NEW), expected)


def test_padding_and_eos_of_a_previous_prompt_are_reset() -> None:
    model = small_model("amam")
    generator = Generator(model)
    ids, mask = pad_batch([prompt(0, 9)[0], prompt(0, 5, 1)[0]])
    whole = torch.cat((prompt(0, 9)[0], prompt(0, 9, 2)[0]))
    expected = greedy(model, whole)
    # Both rows end at once, one with four columns of padding; the next prompt reuses the cache.
    padded = generator.generate(ids, attention_mask=mask, max_new_tokens=1, eos=range(VOCABULARY))
    assert padded.shape == (2, 1)
    assert torch.equal(generator.generate(whole, max_new_tokens=NEW), expected)


def test_stale_cache_contents_are_not_read() -> None:
    generator = Generator(small_model("amam", conv_width=4))
    ids, inputs = batch()
    expected = generator.generate(ids, **inputs, max_new_tokens=NEW)
    cache = generator._sequence.cache
    for tensor in (*cache.tensors, cache.logits):
        tensor.fill_(torch.nan)
    assert torch.equal(generator.generate(ids, **inputs, max_new_tokens=NEW), expected)
    assert generator._sequence.cache is cache


def test_the_pool_evicts_the_least_recently_used_caches() -> None:
    generator = Generator(small_model("aaaa"))
    ids, _ = prompt(0, 5)
    expected = generator.generate(ids, max_new_tokens=NEW)
    for rows in range(2, 9):
        found = generator.generate(ids.repeat(rows, 1), max_new_tokens=NEW)
        assert torch.equal(found, expected.repeat(rows, 1))
    pool = generator._pool
    assert [cache.batch for cache in pool._caches.values()] == [5, 6, 7, 8]
    assert {cache.batch for cache, _ in pool._steps} == {5, 6, 7, 8}
    # The pool keeps at most 2 GiB beside the cache in use.
    columns = 2**21
    assert kv_nbytes(generator._packed, 1, (columns, columns)) == 4 * 2 * (2 * columns * 8) * 4
    pool._evict(2**31)
    assert not pool._caches and not pool._steps


@pytest.mark.parametrize("plan", ["aaaa", "amam", "mmmm"])
def test_kv_nbytes_equals_the_allocated_keys_and_values(plan: str) -> None:
    found = Generator(small_model(plan).bfloat16())._packed
    cache = StaticCache(found, 3, (5, 7))
    layers = [layer for stack in cache.stacks for layer in stack.layers]
    grown = [t.nbytes for layer in layers if isinstance(layer, KVCache) for t in layer.tensors]
    assert len(grown) == 2 * plan.count("a")
    assert kv_nbytes(found, 3, (5, 7)) == sum(grown)


def test_normalize_embedding_output() -> None:
    model = small_model("amam")
    model.config.normalize_embedding_output = True
    ids, inputs = batch()
    found = Generator(model).generate(ids, **inputs, max_new_tokens=NEW)
    assert torch.equal(found, greedy(model, ids, **inputs))


def test_rows_stop_at_eos_and_are_padded() -> None:
    model = small_model("mmmm", seed=3)
    ids, inputs = batch()
    expected = greedy(model, ids, new=40, **inputs)
    # A token that ends the first row early, and the other rows later or never.
    end = int(expected[0, 2])
    model.generation_config.pad_token_id = 7
    theirs = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=end, **inputs)
    found = Generator(model).generate(ids, max_new_tokens=40, eos=end, **inputs)
    assert torch.equal(found, theirs[:, ids.shape[1] :])
    assert (found[0, 3:] == 7).all() and found.shape[1] > 3
    one = Generator(model).generate(
        ids[:1], inputs["pixel_values"][:2], max_new_tokens=40, eos={end}
    )
    assert one.tolist() == [expected[0, :3].tolist()]
    streamed = list(Generator(model).stream(ids, max_new_tokens=40, eos=(end,), **inputs))
    assert streamed == found.T.tolist()


def test_eos_and_suppressed_tokens_of_the_generation_config() -> None:
    model = small_model("mmmm")
    ids, _ = prompt(0, 6)
    plain = greedy(model, ids)[0].tolist()
    model.generation_config.suppress_tokens = [IMAGE_ID, plain[0]]
    other = greedy(model, ids)
    assert other[0, 0] != plain[0]
    assert torch.equal(Generator(model).generate(ids, max_new_tokens=NEW), other)
    model.generation_config.eos_token_id = [int(other[0, 3])]
    found = Generator(model).generate(ids, max_new_tokens=NEW)
    first = other[0].tolist().index(int(other[0, 3]))
    assert torch.equal(found, other[:, : first + 1])
    assert torch.equal(Generator(model).generate(ids, max_new_tokens=NEW, eos=()), other)


def test_a_full_cache_is_refused() -> None:
    model = small_model("amam")
    generator = Generator(model)
    ids, _ = prompt(0, 6)
    with pytest.raises(DataError, match=r"room for 5 columns.*6 are wanted"):
        generator.prefill(ids, capacity=5)
    generator.prefill(ids, capacity=7)
    generator.step(torch.tensor([[4]]))
    with pytest.raises(DataError, match=r"room for 7 columns.*8 are wanted.*capacity=8"):
        generator.step(torch.tensor([[4]]))
    with pytest.raises(DataError, match=r"room for 9 columns.*10 are wanted"):
        generator.generate(ids, max_new_tokens=5, capacity=9)
    assert generator.generate(ids, max_new_tokens=4, capacity=9).shape == (1, 4)


@pytest.mark.parametrize("plan", ["aaaa", "amam", "mmaa"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_the_cache_grows_with_an_answer(
    plan: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(options)
    model = small_model(plan, "post").double()
    ids, inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    new, columns = 40, ids.shape[1]
    wide = Generator(model)
    expected = wide.generate(ids, **inputs, max_new_tokens=new, capacity=columns + new, **options)
    monkeypatch.setattr("mmmamba_cli.inference.cache_pool.PAD_CAPACITY_TO", 4)
    monkeypatch.setattr("mmmamba_cli.inference.generator.ANSWER_COLUMNS", 2)
    generator = Generator(model)
    for _ in range(2):
        # The second time, the larger caches are in the pool.
        found = generator.generate(ids, **inputs, max_new_tokens=new, **options)
        assert torch.equal(found, expected)
        streamed = list(generator.stream(ids, **inputs, max_new_tokens=new, **options))
        assert streamed == expected.T.tolist()
    small = Generator(model)
    next(small.stream(ids, **inputs, max_new_tokens=10**6, **options))
    assert small.cache_bytes < generator.cache_bytes
    # A finished row stays padded in the larger cache.
    options["eos"] = int(expected[0, 1])
    ended = wide.generate(ids, **inputs, max_new_tokens=new, capacity=columns + new, **options)
    assert (ended[0, 2:] == 0).all() and ended.shape[1] > 12
    found = generator.generate(ids, **inputs, max_new_tokens=new, **options)
    assert torch.equal(found, ended)
    # A given capacity is not exceeded.
    with pytest.raises(DataError, match="room for"):
        small.generate(ids, **inputs, max_new_tokens=new, capacity=columns + 5)


def test_the_embedding_stack_has_capacity_for_all_patches() -> None:
    model = small_model("aaaa", "post")
    ids, pixels = prompt(61, 6)
    found = Generator(model).generate(ids, pixels, max_new_tokens=6, capacity=255)
    assert torch.equal(found, greedy(model, ids, new=6, pixel_values=pixels))


def test_without_attention_the_cache_has_no_limit() -> None:
    model = small_model("mmmm")
    generator = Generator(model)
    ids, _ = prompt(0, 6)
    generator.prefill(ids, capacity=6)
    size = generator.cache_bytes
    for _ in range(600):
        generator.step(torch.tensor([[4]]))
    assert generator.cache_bytes == size
    assert Generator(small_model("amam")).cache_bytes == 0


def test_start_allocates_and_release_frees() -> None:
    generator = Generator(small_model("aaaa"))
    generator.start(2, 300)
    # Four layers of keys and values in fp32, two heads of 8; capacity is rounded up to 512 columns.
    assert generator.cache_bytes == 4 * 2 * (2 * 2 * 512 * 8) * 4
    generator.release()
    assert generator.cache_bytes == 0
    with pytest.raises(ValueError, match="prefill comes first"):
        generator.step(torch.tensor([[4]]))


def test_fill_random_is_like_a_prefill() -> None:
    model = small_model("amam", rope_scaling={"type": "dynamic", "factor": 2.0})
    generator = Generator(model)
    generator.fill_random(1, 20, capacity=22)
    # Both stacks and the position of each row are after the 20 columns.
    assert (generator._sequence.cache.counters == 20).all()
    first = generator.step(torch.tensor([[4]])).clone()
    generator.step(torch.tensor([[4]]))
    with pytest.raises(DataError, match="room for 22"):
        generator.step(torch.tensor([[4]]))
    assert first.isfinite().all()
    generator.fill_random(1, 20, capacity=22)
    assert torch.equal(generator.step(torch.tensor([[4]])), first)


def test_decode_tokens_samples_like_step_and_argmax() -> None:
    generator = Generator(small_model("amam"))
    generator.fill_random(2, 20, capacity=24)
    token = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(4):
        logits = generator.step(token)
        logits[:, IMAGE_ID] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
    # EOS and padding settings of a previous answer must not apply.
    generator.generate(prompt(0, 5)[0], max_new_tokens=1, eos=range(VOCABULARY))
    generator.fill_random(2, 20, capacity=24, settings=Settings(eos=()))
    with pytest.raises(ValueError, match="prefill comes first"):
        generator.step(token)
    generator._sequence.cache.ids.zero_()
    assert torch.equal(generator.decode_tokens(4), token)
    with pytest.raises(DataError, match="room for 24"):
        generator.decode_tokens(1)
    generator.prefill(prompt(0, 5)[0])
    with pytest.raises(ValueError, match="fill_random with settings comes first"):
        generator.decode_tokens(1)


def test_invalid_inputs_are_refused() -> None:
    model = small_model("amam")
    generator = Generator(model)
    ids, mask = pad_batch([prompt(0, 5)[0], prompt(0, 8)[0]], side="right")
    with pytest.raises(DataError, match="pad prompts on the left"):
        generator.generate(ids, attention_mask=mask)
    within = torch.ones_like(ids)
    within[0, 2] = 0
    with pytest.raises(DataError, match="padding at its right or within"):
        generator.generate(ids, attention_mask=within)
    with pytest.raises(DataError, match=r"attention_mask is \(2, 3\)"):
        generator.generate(ids, attention_mask=mask[:, :3])
    with pytest.raises(DataError, match="chunk is 0"):
        generator.prefill(ids, chunk=0)
    with pytest.raises(DataError, match=r"input_ids is \(2, 0\), expected at least one row"):
        generator.generate(ids[:, :0], max_new_tokens=4)
    with pytest.raises(DataError, match="max_new_tokens is 0"):
        generator.generate(ids, max_new_tokens=0)
    with pytest.raises(MmmambaError, match="on a GPU, but it is on cpu"):
        Generator(model, graphs=True)
    assert generator.prefill(ids).shape == (2, VOCABULARY)
    with pytest.raises(ValueError, match=r"expected \(2, 1\)"):
        generator.step(ids)


def test_a_stream_fails_after_another_prefill() -> None:
    generator = Generator(small_model("mmmm"))
    ids, _ = prompt(0, 5)
    answer = generator.stream(ids, max_new_tokens=NEW)
    next(answer)
    generator.prefill(ids)
    with pytest.raises(ValueError, match="another prompt"):
        next(answer)


@pytest.mark.parametrize(("plan", "op"), [("mm", "mixer_step"), ("dd", "delta_mixer_step")])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"rope": True}])
def test_one_op_reads_a_token_unless_a_norm_or_rope_comes_between(
    plan: str, op: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    right = BACKENDS[op]["reference"]

    def counted(*arguments: Any, inputs_ready: bool) -> torch.Tensor:
        calls.append(inputs_ready)
        return right(*arguments, inputs_ready=inputs_ready)

    monkeypatch.setitem(BACKENDS[op], "reference", counted)  # type: ignore[index]
    generator = Generator(small_model(plan, **options))
    generator.prefill(prompt(0, 5)[0])
    generator.step(torch.tensor([[4]]))
    assert calls == ([] if options else [True, True])
