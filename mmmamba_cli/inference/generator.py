"""Answers from a model as fast as its memory is read: packed weights, static memory, graphs.

Legend: B batch, T columns of the prompt, V vocabulary, N new tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.inference.cache_pool import Shelf, Step
from mmmamba_cli.inference.packed_model import plan_of, weights_size
from mmmamba_cli.inference.prefill import extra_columns, read, real_columns
from mmmamba_cli.inference.sampling import Choice, Chooser, Settings, ends_of
from mmmamba_cli.inference.static_cache import States
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.prepared_inputs import check_not_empty

# Room is made in steps of so many columns, so that prompts of like length share a graph, and there
# is always enough to warm up in.
ROUNDED_TO = 256
# Room behind a prompt whose caller does not say how much; for an answer that becomes longer it is
# doubled on the way. Most end early, and what is not there need not be read or taken.
ANSWER = 1024
# Tokens between two looks at whether all rows have ended: each look waits for the device, and what
# was launched in vain is waited for too.
LOOK_EVERY = 4

# Ids, pixels and mask, as `prefill` takes them.
Inputs = tuple[Tensor, Tensor | None, Tensor | None]


class Generator:
    """Decodes with `model`, whose weights it packs in place (`decoding.pack`).

    The model goes on working; after its weights were moved, cast or trained, make a new one. A
    model whose weights were made int8 (`decoding.quantize`) is decoded as such. There is one
    sequence of prompts and answers: not for several threads at a time.

    `graphs`: whether each step is one CUDA graph; None where the model is on a GPU and there is
    Triton. `backend` as in `mmmamba_cli.ops`, of steps; prompts are read as "auto" does.

    Raises `MmmambaError` for a model that cannot be packed, or graphs without a GPU.
    """

    def __init__(self, model: HolisticVLM, *, graphs: bool | None = None, backend: str = "auto"):
        device = model.device
        if graphs and device.type != "cuda":
            raise MmmambaError(
                f"CUDA graphs want the model on a GPU, and it is on {device}",
                "move it there first, or leave graphs out",
            )
        self.model = model
        self._plan = plan_of(model)
        self._chooser = Chooser(len(self._plan.text_embedding), device)
        captures = _suits_graphs(self._plan.text_embedding, backend) if graphs is None else graphs
        self._shelf = Shelf(model, self._plan, self._chooser, captures, backend)
        self._reading: _Reading | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the projections and the head, which every step reads in full."""
        return weights_size(self._plan)

    @property
    def cache_bytes(self) -> int:
        """Of the memory in use: keys, values and states, room included."""
        return 0 if self._reading is None else self._reading.states.nbytes

    def start(self, batch: int, capacity: int) -> None:
        """Make room for `capacity` columns, and what a step needs, ahead of a `prefill` of text."""
        self._begin(batch, capacity, capacity, 0, None)

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
        """Read a prompt and forget what was before; the logits (B, V) after its last column.

        Args:
            input_ids: (B, T); rows of unequal length are padded on the left.
            pixel_values: as in the model's forward.
            attention_mask: (B, T), 1 for real tokens.
            capacity: columns there is room for, prompt included; None leaves room for an answer.
                A model without attention remembers as much whatever it has read: there is no limit.
            chunk: columns that pass the model at a time; None is as suits it. The result does not
                depend on it.

        Raises:
            DataError: a prompt longer than `capacity`, padding elsewhere than at the left, image
                context tokens and tiles that do not agree.
        """
        inputs = (input_ids, pixel_values, attention_mask)
        length = input_ids.shape[1]
        wanted = length if capacity is not None else length + ANSWER
        return self._read(inputs, wanted, capacity, chunk, None).states.logits

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """The logits (B, V) after one more token of each row, ids (B, 1).

        The next step, or prompt, writes into the same tensor. Raises `DataError` if there is no
        room left.
        """
        reading = self._reading
        if reading is None or reading.chooses:
            raise ValueError("step: prefill comes first")
        if ids.shape != (reading.states.batch, 1):
            raise ValueError(
                f"step: ids are {tuple(ids.shape)}, expected ({reading.states.batch}, 1)"
            )
        reading.states.ids.copy_(ids[:, 0])
        reading.advance()
        return reading.states.logits

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
        """Answers to prompts, (B, N) new ids without the prompt; N is as far as the longest goes.

        Greedy at temperature 0: the tokens of `model.generate`. Else drawn from the `top_k`
        likeliest, or the likeliest that have probability `top_p` together, or all; a seed gives the
        same tokens again on the same device. A row ends with a token of `eos`, and is padded from
        there: None is as the model's generation config says, () is never. Tokens which that config
        suppresses are never chosen. The rest as in `prefill`.

        Raises `DataError` as `prefill` does, and for settings that mean nothing.
        """
        settings = Settings(max_new_tokens, temperature, top_k, top_p, eos, seed)
        inputs = (input_ids, pixel_values, attention_mask)
        reading = self._open(inputs, settings, capacity, chunk)
        ends = bool(ends_of(settings, self.model.generation_config))
        found = [reading.states.ids.clone()]
        while len(found) < max_new_tokens:
            if ends and len(found) % LOOK_EVERY == 0 and bool(reading.states.finished.all()):
                break
            self._go_on(reading)
            found.append(reading.states.ids.clone())
        tokens = torch.stack(found, dim=1)
        if not bool(reading.states.finished.all()):
            return tokens
        last = self._chooser.ends[tokens].int().argmax(1).max()
        return tokens[:, : int(last) + 1]

    @torch.no_grad()
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
        """`generate` token by token: the next id of each of the B rows, as soon as it is there."""
        settings = Settings(max_new_tokens, temperature, top_k, top_p, eos, seed)
        inputs = (input_ids, pixel_values, attention_mask)
        reading = self._open(inputs, settings, capacity, chunk)
        for count in range(max_new_tokens):
            if self._reading is not reading:
                raise ValueError("stream: another prompt was read before this answer had its end")
            if count > 0:
                self._go_on(reading)
            states = reading.states
            # One wait for both.
            ids, finished = torch.stack((states.ids, states.finished.long())).tolist()
            yield ids
            if all(finished):
                return

    @torch.no_grad()
    def pretend(
        self,
        batch: int,
        columns: int,
        capacity: int,
        seed: int = 0,
        settings: Settings | None = None,
    ) -> None:
        """Be as after a prompt of `columns` tokens, with random contents: for measuring.

        With `settings`, tokens are chosen as they say, and `advance` goes on; without, `step` does.
        """
        choice = None if settings is None else settings.choice
        reading = self._begin(batch, columns, capacity, 0, choice)
        reading.seen = columns
        device = reading.states.ids.device
        reading.states.clear()
        reading.states.pretend(columns, torch.Generator(device).manual_seed(seed))
        if settings is not None:
            self._chooser.prepare(settings, self.model.generation_config)

    @torch.no_grad()
    def advance(self, tokens: int) -> Tensor:
        """Read the token chosen last, choose the next, so many times; the last ids (B, 1).

        Waits for nothing. Comes after `pretend` with settings. Raises `DataError` if there is no
        room left.
        """
        reading = self._reading
        if reading is None or not reading.chooses:
            raise ValueError("advance: pretend with settings comes first")
        for _ in range(tokens):
            reading.advance()
        return reading.states.ids.unsqueeze(1)

    def release(self) -> None:
        """Let go of all memory but the weights."""
        self._reading = None
        self._shelf.clear()

    def _open(
        self, inputs: Inputs, settings: Settings, capacity: int | None, chunk: int | None
    ) -> _Reading:
        """Read a prompt and choose the first token."""
        # The last token is chosen and never read.
        answer = settings.max_new_tokens - 1
        wanted = inputs[0].shape[1] + (answer if capacity is not None else min(answer, ANSWER))
        reading = self._read(inputs, wanted, capacity, chunk, settings.choice)
        self._chooser.prepare(settings, self.model.generation_config)
        self._chooser.choose(reading.states, settings.choice)
        return reading

    def _go_on(self, reading: _Reading) -> None:
        """Read the token chosen last and choose the next, with more room where it is used up.

        That is never so where the caller gave a capacity: all of the answer has room there.
        """
        if reading.is_full:
            room = 2 * reading.seen
            states, choice = reading.states, reading.choice
            # Capturing draws numbers that the answer does not.
            drawn = self._chooser.rng.get_state()
            rooms = self._rooms(room, reading.extra)
            reading.states, reading.step = self._shelf.take(states.batch, rooms, choice)
            self._chooser.rng.set_state(drawn)
            reading.states.take_over(states)
            reading.limit = room
        reading.advance()

    def _read(
        self,
        inputs: Inputs,
        wanted: int,
        capacity: int | None,
        chunk: int | None,
        choice: Choice | None,
    ) -> _Reading:
        if chunk is not None and chunk < 1:
            raise DataError(f"chunk is {chunk}, expected at least 1", "leave it out")
        input_ids, pixel_values, attention_mask = inputs
        check_not_empty(input_ids)
        mask = real_columns(input_ids, attention_mask)
        extra = extra_columns(self.model, input_ids, pixel_values)
        reading = self._begin(input_ids.shape[0], wanted, capacity, extra, choice)
        reading.seen = input_ids.shape[1]
        states, reader = reading.states, self._shelf.reader(reading.states)
        read(self.model, states, input_ids, pixel_values, mask, chunk, reader)
        return reading

    def _begin(
        self, batch: int, wanted: int, capacity: int | None, extra: int, choice: Choice | None
    ) -> _Reading:
        """Memory with room for `wanted` columns, and for `extra` ones in the embedding stack."""
        self._reading = None
        room = _rounded(wanted) if capacity is None else capacity
        limit = room if self._plan.grows else None
        _require_room(wanted, limit)
        states, step = self._shelf.take(batch, self._rooms(room, extra), choice)
        self._reading = _Reading(states, step, limit, choice, extra)
        return self._reading

    def _rooms(self, room: int, extra: int) -> tuple[int, ...]:
        """Of each stack, in columns; the embedding stack is the first of two."""
        rooms = [_rounded(room)] * len(self._plan.stacks)
        rooms[0] += _rounded(extra)
        grown = [stack.grows for stack in self._plan.stacks]
        return tuple(room if grows else 0 for room, grows in zip(rooms, grown, strict=True))


class _Reading:
    """One prompt and its answer as far as it is: `seen` columns were read of `limit`.

    `extra` are columns of the embedding stack alone.
    """

    def __init__(
        self, states: States, step: Step, limit: int | None, choice: Choice | None, extra: int
    ):
        self.states = states
        self.step = step
        self.limit = limit
        self.choice = choice
        self.extra = extra
        self.seen = 0

    @property
    def chooses(self) -> bool:
        return self.choice is not None

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.seen >= self.limit

    def advance(self) -> None:
        """Read the token in `states.ids`. Raises `DataError` if there is no room."""
        _require_room(self.seen + 1, self.limit)
        self.seen += 1
        self.step()


def _require_room(wanted: int, limit: int | None) -> None:
    if limit is not None and wanted > limit:
        raise DataError(
            f"there is room for {limit} columns, prompt and answer together, and {wanted} are "
            "wanted",
            f"give capacity={wanted} or more",
        )


def _rounded(columns: int) -> int:
    return -(-columns // ROUNDED_TO) * ROUNDED_TO


def _suits_graphs(weight: Tensor, backend: str) -> bool:
    """Whether a step is best captured: with kernels, that is, and where they run."""
    has_triton = importlib.util.find_spec("triton") is not None and backend != "reference"
    return weight.is_cuda and weight.dtype != torch.float64 and has_triton
