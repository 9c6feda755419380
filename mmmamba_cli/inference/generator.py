"""Token generation with packed weights, a static cache and CUDA graphs.

Legend: B batch, T columns of the prompt, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.inference.cache_pool import CachePool, round_up
from mmmamba_cli.inference.cuda_graphs import Runnable, supports_graphs
from mmmamba_cli.inference.packed_model import pack_model, weight_nbytes
from mmmamba_cli.inference.prefill import left_padding_mask, prefill
from mmmamba_cli.inference.sampling import Sampler, SamplingMode, Settings, eos_ids
from mmmamba_cli.inference.static_cache import StaticCache
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.prepared_inputs import check_not_empty

# Columns reserved for an answer if no capacity is given; doubled when an answer outgrows them. Most
# answers end early, and a smaller cache takes less memory and time to read.
ANSWER_COLUMNS = 1024
# On a GPU, check for EOS every this many tokens: each check synchronizes with the device.
EOS_CHECK_INTERVAL = 4

# input_ids, pixel_values and attention_mask, as `Generator.prefill` takes them.
PromptInputs = tuple[Tensor, Tensor | None, Tensor | None]


class Generator:
    """Generates tokens with `model`, whose weights it packs in place (`pack`).

    The model stays usable. Make a new generator after its weights were moved, cast or trained. A
    quantized model (`quantize`) is decoded from its int8 weights. A generator holds one batch of
    sequences at a time and is not thread-safe.

    Args:
        model: the model to decode with.
        graphs: whether each step is one CUDA graph; None is True if the model is on a GPU and
            Triton is installed.
        backend: backend of the ops of a decoding step, as in `mmmamba_cli.ops`; prefill uses
            "auto".

    Raises:
        MmmambaError: a model that cannot be packed, or `graphs` without a GPU.
    """

    def __init__(self, model: HolisticVLM, *, graphs: bool | None = None, backend: str = "auto"):
        device = model.device
        if graphs and device.type != "cuda":
            raise MmmambaError(
                f"CUDA graphs need the model on a GPU, but it is on {device}",
                "move it there first, or leave graphs out",
            )
        self.model = model
        self._packed = pack_model(model)
        table = self._packed.text_embedding
        self._sampler = Sampler(len(table), device)
        captures = supports_graphs(table, backend) if graphs is None else graphs
        self._pool = CachePool(model, self._packed, self._sampler, captures, backend)
        self._sequence: _Sequence | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the projections and the LM head, which every step reads in full."""
        return weight_nbytes(self._packed)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache in use (KV cache and states) at its full capacity."""
        return 0 if self._sequence is None else self._sequence.cache.nbytes

    def start(self, batch: int, capacity: int) -> None:
        """Allocate a cache of `capacity` columns and capture its step before a text `prefill`."""
        self._allocate(batch, capacity, capacity, 0, None)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        capacity: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Read a prompt into a cleared cache; returns the logits (B, V) after its last column.

        Args:
            input_ids: (B, T); rows of unequal length are padded on the left.
            pixel_values: as in the model's forward.
            attention_mask: (B, T), 1 for real tokens.
            capacity: columns of the cache, prompt included; None leaves room for an answer.
                Ignored without attention, where the state has a fixed size.
            chunk: columns that pass the model at a time; None picks a size. Does not change the
                result.

        Raises:
            DataError: a prompt longer than `capacity`, padding that is not on the left, or image
                tokens that do not match `pixel_values`.
        """
        inputs = (input_ids, pixel_values, attention_mask)
        length = input_ids.shape[1]
        columns = length if capacity is not None else length + ANSWER_COLUMNS
        return self._prefill(inputs, columns, capacity, chunk, None).cache.logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Decode one more token of each row, ids (B, 1); returns the next logits (B, V).

        The next call overwrites the returned tensor. Raises `DataError` if the cache is full.
        """
        sequence = self._sequence
        if sequence is None or sequence.mode is not None:
            raise ValueError("step: prefill comes first")
        cache = sequence.cache
        if ids.shape != (cache.batch, 1):
            raise ValueError(f"step: ids are {tuple(ids.shape)}, expected ({cache.batch}, 1)")
        cache.ids.copy_(ids[:, 0])
        sequence.advance()
        return cache.logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        seed: int = 0,
        capacity: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Generate answers to prompts; returns the new ids (B, N), N that of the longest answer.

        Temperature 0 is greedy and gives the tokens of `model.generate`. Otherwise tokens are
        sampled; the same seed gives the same tokens on the same device. A row ends with one of
        `eos` and is padded from there. Tokens that the generation config suppresses are never
        chosen. Parameters are those of `Settings` and `prefill`.

        Raises:
            DataError: as `prefill` and `Settings` do.
        """
        settings = Settings(max_new_tokens, temperature, top_k, top_p, eos, seed)
        inputs = (input_ids, pixel_values, attention_mask)
        sequence = self._begin_answer(inputs, settings, capacity, chunk)
        has_eos = bool(eos_ids(settings, self.model.generation_config))
        found = [sequence.cache.ids.clone()]
        interval = EOS_CHECK_INTERVAL if found[0].is_cuda else 1
        while len(found) < max_new_tokens:
            is_check = has_eos and len(found) % interval == 0
            if is_check and bool(sequence.cache.finished.all()):
                break
            if sequence.is_full:
                self._grow(sequence)
            sequence.advance()
            found.append(sequence.cache.ids.clone())
        tokens = torch.stack(found, dim=1)
        if not bool(sequence.cache.finished.all()):
            return tokens
        last = self._sampler.is_eos[tokens].int().argmax(1).max()
        return tokens[:, : int(last) + 1]

    def stream(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        seed: int = 0,
        capacity: int | None = None,
        chunk: int | None = None,
    ) -> Iterator[list[int]]:
        """`generate` token by token: yields the next id of each of the B rows."""
        settings = Settings(max_new_tokens, temperature, top_k, top_p, eos, seed)
        inputs = (input_ids, pixel_values, attention_mask)
        yield from self.stream_answer(inputs, settings, capacity, chunk)

    @torch.no_grad()
    def stream_answer(
        self,
        inputs: PromptInputs,
        settings: Settings,
        capacity: int | None = None,
        chunk: int | None = None,
    ) -> Iterator[list[int]]:
        """`stream` with its sampling parameters as `Settings`.

        `inputs` are input_ids, pixel_values and attention_mask.
        """
        sequence = self._begin_answer(inputs, settings, capacity, chunk)
        for count in range(settings.max_new_tokens):
            if self._sequence is not sequence:
                raise ValueError("stream: another prompt was read before this answer had its end")
            if count > 0:
                if sequence.is_full:
                    self._grow(sequence)
                sequence.advance()
            cache = sequence.cache
            # One synchronization for both.
            ids, finished = torch.stack((cache.ids, cache.finished.long())).tolist()
            yield ids
            if all(finished):
                return

    @torch.no_grad()
    def fill_random(
        self,
        batch: int,
        columns: int,
        capacity: int,
        seed: int = 0,
        settings: Settings | None = None,
    ) -> None:
        """Fill the cache with random contents, as if after `columns` tokens; for benchmarks.

        Continue with `decode_tokens` if `settings` are given, otherwise with `step`.
        """
        mode = None if settings is None else settings.mode
        sequence = self._allocate(batch, columns, capacity, 0, mode)
        sequence.length = columns
        cache = sequence.cache
        cache.clear()
        cache.fill_random(columns, torch.Generator(cache.ids.device).manual_seed(seed))
        if settings is not None:
            self._sampler.configure(settings, self.model.generation_config)

    @torch.no_grad()
    def decode_tokens(self, count: int) -> Tensor:
        """Decode `count` tokens after `fill_random` with settings; returns the last ids (B, 1).

        Does not synchronize. Raises `DataError` if the cache is full.
        """
        sequence = self._sequence
        if sequence is None or sequence.mode is None:
            raise ValueError("decode_tokens: fill_random with settings comes first")
        for _ in range(count):
            sequence.advance()
        return sequence.cache.ids.unsqueeze(1)

    def release(self) -> None:
        """Free all memory but the weights."""
        self._sequence = None
        self._pool.clear()

    def _begin_answer(
        self, inputs: PromptInputs, settings: Settings, capacity: int | None, chunk: int | None
    ) -> _Sequence:
        """Read a prompt and sample the first token."""
        # The last token is sampled and never read.
        answer = settings.max_new_tokens - 1
        reserved = answer if capacity is not None else min(answer, ANSWER_COLUMNS)
        columns = inputs[0].shape[1] + reserved
        sequence = self._prefill(inputs, columns, capacity, chunk, settings.mode)
        self._sampler.configure(settings, self.model.generation_config)
        self._sampler.sample(sequence.cache, settings.mode)
        return sequence

    def _prefill(
        self,
        inputs: PromptInputs,
        columns: int,
        capacity: int | None,
        chunk: int | None,
        mode: SamplingMode | None,
    ) -> _Sequence:
        if chunk is not None and chunk < 1:
            raise DataError(f"chunk is {chunk}, expected at least 1", "leave it out")
        input_ids, pixel_values, attention_mask = inputs
        mask, extra = _check_prompt(self.model, input_ids, pixel_values, attention_mask)
        sequence = self._allocate(input_ids.shape[0], columns, capacity, extra, mode)
        sequence.length = input_ids.shape[1]
        cache, graphs = sequence.cache, self._pool.graph_prefill(sequence.cache)
        prefill(self.model, cache, input_ids, pixel_values, mask, chunk, graphs)
        return sequence

    def _allocate(
        self, batch: int, columns: int, capacity: int | None, extra: int, mode: SamplingMode | None
    ) -> _Sequence:
        """Start a sequence whose cache holds `columns`, plus `extra` in the embedding stack."""
        self._sequence = None
        capacity = round_up(columns) if capacity is None else capacity
        limit = capacity if self._packed.has_attention else None
        _require_capacity(columns, limit)
        cache, step = self._pool.take(batch, capacity, extra, mode)
        self._sequence = _Sequence(cache, step, limit, mode, extra)
        return self._sequence

    def _grow(self, sequence: _Sequence) -> None:
        """Move a full sequence into a cache of twice its length.

        Never needed with a `capacity` from the caller, which covers the whole answer.
        """
        old, limit = sequence.cache, 2 * sequence.length
        # Warm-up steps of a capture draw random numbers; the answer's must not change.
        rng_state = self._sampler.rng.get_state()
        sequence.cache, sequence.step = self._pool.take(
            old.batch, limit, sequence.extra, sequence.mode
        )
        self._sampler.rng.set_state(rng_state)
        sequence.cache.copy_from(old)
        sequence.limit = limit


def make_generator(model: HolisticVLM) -> Generator | None:
    """A generator of `model`; None for a model that cannot be packed, for example with adapters."""
    try:
        return Generator(model)
    except MmmambaError:
        return None


@dataclass
class _Sequence:
    """One batch of prompts and answers: `length` columns were read, of at most `limit`.

    `step` advances `cache` by one token and, with a `mode`, samples the next one. `extra` is the
    number of columns that only the embedding stack has.
    """

    cache: StaticCache
    step: Runnable
    limit: int | None
    mode: SamplingMode | None
    extra: int
    length: int = 0

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.length >= self.limit

    def advance(self) -> None:
        """Read the tokens in `cache.ids`. Raises `DataError` if the cache is full."""
        _require_capacity(self.length + 1, self.limit)
        self.length += 1
        self.step()


def _require_capacity(columns: int, limit: int | None) -> None:
    if limit is not None and columns > limit:
        raise DataError(
            f"there is room for {limit} columns, prompt and answer together, and {columns} are "
            "wanted",
            f"give capacity={columns} or more",
        )


def _check_prompt(
    model: HolisticVLM,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor | None, int]:
    """Validate a prompt before a cache is allocated.

    Returns:
        The mask (B, T) bool, None without padding, and the columns that the embedding stack has
        beyond the language stack: it sees every patch of a tile if the pixel shuffle comes after.

    Raises:
        DataError: no rows or columns, or padding that is not on the left: decoding appends on the
            right, where every row has to end with a real token.
    """
    check_not_empty(input_ids)
    mask = None if attention_mask is None else left_padding_mask(input_ids, attention_mask)
    vision = model.config.vision_config
    if pixel_values is None or vision is None or vision.pixel_shuffle != "post":
        return mask, 0
    longest = int((input_ids == vision.image_token_id).sum(1).max())
    return mask, longest * (vision.merge**2 - 1)
