"""Prompts of a model without attention, in parts of fixed sizes, each one CUDA graph.

Launching the kernels of a few thousand columns one by one takes the host longer than they run. All
that a part needs is what the last one left, so the same graph serves wherever a part lies; what is
missing to whole parts is padding in front, which leaves no trace in any memory. Legend: B batch,
T columns of the prompt, N columns of a part, D hidden size.

Prompts of models with attention, whole: each number of columns, rounded up, one CUDA graph.

A causal flag is all of the mask only where a prompt passes whole, and what is missing to a round
number of columns stands behind it, where no real token sees it. It leaves no trace in the memory of
Mamba-2 layers, and in that of attention lies where the next tokens' keys and values come to lie.
Longer prompts keep the device busy for longer than the host takes to launch them one by one.
Legend: B batch, T columns of the prompt, N columns of the graph, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.inference.cuda_graphs import Capture, Works
from mmmamba_cli.inference.decode_step import Padding, embedded, read_stacks
from mmmamba_cli.inference.packed_model import AttentionPlan, ModelPlan, ScanPlan
from mmmamba_cli.inference.static_cache import PrefillCache, States
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.rope import depends_on_length
from mmmamba_cli.model.sequence_layout import StackState, next_layout

# Tokens of a part, all rows together, largest first: the more, the faster for each. What is left of
# a prompt is one part, of a multiple of so many columns.
TOKENS, ROUNDED_TO = (16384, 4096), 512
LEAST_COLUMNS = 64


class Kind(NamedTuple):
    """What a graph is made for: columns of a part, and whether some may be padding."""

    columns: int
    padded: bool


def suits(plan: ModelPlan) -> bool:
    """Whether every mixer is stepped by one op: nothing then asks for positions or keys."""
    layers = [layer for stack in plan.stacks for layer in stack.layers]
    return all(isinstance(one.mixer, ScanPlan) and one.mixer.is_plain for one in layers)


def cut(length: int, padding: int, batch: int) -> list[Kind]:
    """Parts of a prompt of `length` columns, the first `padding` of which are padded in some row.

    Together they may have more columns than the prompt: what is missing stands in front.
    """
    rows = 1 << (batch - 1).bit_length()
    large = [max(LEAST_COLUMNS, tokens // rows) for tokens in TOKENS]
    step = min(ROUNDED_TO, large[-1])
    sizes, rest = [], length
    for columns in large:
        sizes += [columns] * (rest // columns)
        rest %= columns
    if rest:
        sizes.append(-(-rest // step) * step)
    sizes.sort()
    in_front = sum(sizes) - length
    found, start = [], 0
    for columns in sizes:
        # Without padding a part is a little faster; what is left is not worth another graph.
        found.append(Kind(columns, columns < large[-1] or start < in_front + padding))
        start += columns
    return found


class PartReader:
    """Reads prompts into `states`, over which its graphs are made by `capture`."""

    def __init__(self, model: HolisticVLM, states: States, capture: Capture):
        self._states = states
        self._works: Works[Kind, _Part] = Works(lambda kind: _Part(model, states, kind), capture)

    def takes(self, length: int, mask: Tensor | None) -> bool:
        """Whether it reads such prompts; as `Reader` asks."""
        return True

    def read(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """As `Reader` says."""
        batch, length = inputs.shape[:2]
        padding = 0 if mask is None else int((~mask).sum(1).max())
        kinds = cut(length, padding, batch)
        counted = Counter(kinds).items()
        works = {kind: self._works.prepared(kind, count) for kind, count in counted}
        in_front = sum(kind.columns for kind in kinds) - length
        real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
        padded = ~F.pad(real, (in_front, 0)).unsqueeze(-1)
        self._states.clear()
        start = 0
        for kind in kinds:
            (part, run), stop = works[kind], start + kind.columns
            # The first part is larger than what is missing.
            columns = inputs[:, max(0, start - in_front) : stop - in_front]
            part.fill(embedded(self._states, columns))
            if part.padding is not None:
                part.padding.columns.copy_(padded[:, start:stop])
            run()
            start = stop
        self._states.seen(length)
        return part.last


class _Part:
    """The work of one part: what `fill` puts in, and `padding`; `last` (B, D) comes out.

    The work may write over its input, which is filled anew for each.
    """

    def __init__(self, model: HolisticVLM, states: States, kind: Kind):
        like, shape = states.plan.text_embedding, (states.batch, kind.columns)
        self._blocks = model.model.blocks
        self._states = states
        self._hidden = like.new_zeros(*shape, model.config.hidden_size)
        self.padding: Padding | None = None
        if kind.padded:
            self.padding = Padding(like.new_zeros(*shape, 1, dtype=torch.bool))
        self.last = like.new_zeros(states.batch, model.config.hidden_size)

    def fill(self, hidden: Tensor) -> None:
        """What the first layer sees of the last columns (B, N or fewer, D); zeros before."""
        missing = self._hidden.shape[1] - hidden.shape[1]
        self._hidden[:, :missing].zero_()
        self._hidden[:, missing:].copy_(hidden)

    def __call__(self) -> None:
        unseen = [None] * len(self._states.stacks)
        hidden = read_stacks(self._states, self._blocks, self._hidden, unseen, None, self.padding)
        self.last.copy_(hidden[:, -1])


# Tokens of a prompt, all rows together, that a graph is made for at most; what N is a multiple of.
MOST, PAD_PROMPT_TO = 8192, 128


def suits_whole(plan: ModelPlan) -> bool:
    """Whether all that is asked for more than its inputs is attention."""
    mixers = [layer.mixer for stack in plan.stacks for layer in stack.layers]
    return all(isinstance(mixer, AttentionPlan) or mixer.is_plain for mixer in mixers)


class WholeReader:
    """Reads prompts without padding into `states`, over which its graphs are made by `capture`."""

    def __init__(self, model: HolisticVLM, states: States, capture: Capture):
        self._states = states
        # One for all of them: many lengths come in an evaluation.
        inputs = states.plan.text_embedding.new_zeros(MOST * model.config.hidden_size)
        self._works: Works[int, _Whole] = Works(
            lambda columns: _Whole(model, states, columns, inputs), capture
        )

    def takes(self, length: int, mask: Tensor | None) -> bool:
        """Whether it reads such prompts; as `Reader` asks."""
        columns = _rounded(length)
        if mask is not None or columns * self._states.batch > MOST:
            return False
        for stack in self._states.stacks:
            config = stack.plan.config
            if stack.plan.grows and columns > stack.room:
                return False
            # There the angles are another prompt's others.
            if depends_on_length(config) and length > config.max_position_embeddings:
                return False
        return True

    def read(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """As `Reader` says."""
        length = inputs.shape[1]
        work, run = self._works.prepared(_rounded(length))
        self._states.clear()
        work.fill(embedded(self._states, inputs))
        run()
        self._states.seen(length)
        return work.last


class _Whole:
    """The work of a prompt: what `fill` puts in; `last` (B, D) comes out."""

    def __init__(self, model: HolisticVLM, states: States, columns: int, inputs: Tensor):
        like, size = states.plan.text_embedding, model.config.hidden_size
        self._blocks = model.model.blocks
        self._states = states
        self._hidden = inputs[: states.batch * columns * size].view(states.batch, columns, size)
        self._length = torch.ones(1, dtype=torch.int64, device=like.device)
        self._columns = [
            next_layout(
                stack.plan.config,
                StackState(),
                columns,
                mask=None,
                seq_idx=None,
                # Short enough for the angles that all short ones have.
                prompt_lengths=self._length,
                device=like.device,
                dtype=like.dtype,
            )
            for stack in states.stacks
        ]
        self.last = like.new_zeros(states.batch, size)

    def fill(self, hidden: Tensor) -> None:
        """What the first layer sees of the prompt (B, T, D), T at most N; zeros behind."""
        length = hidden.shape[1]
        self._hidden[:, :length].copy_(hidden)
        self._hidden[:, length:].zero_()
        self._length.fill_(length)

    def __call__(self) -> None:
        places = torch.arange(self._hidden.shape[1], device=self._length.device)
        padding = Padding((places >= self._length).view(1, -1, 1), self._length)
        cache = PrefillCache(self._states)
        hidden = read_stacks(
            self._states, self._blocks, self._hidden, self._columns, cache, padding
        )
        self.last.copy_(hidden.index_select(1, self._length - 1).squeeze(1))


def _rounded(length: int) -> int:
    return -(-length // PAD_PROMPT_TO) * PAD_PROMPT_TO
