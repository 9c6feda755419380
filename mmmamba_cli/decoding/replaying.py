"""Prompts of a model without attention, in parts of fixed sizes, each one CUDA graph.

Launching the kernels of a few thousand columns one by one takes the host longer than they run. All
that a part needs is what the last one left, so the same graph serves wherever a part lies; what is
missing to whole parts is padding in front, which leaves no trace in any memory. Legend: B batch,
T columns of the prompt, N columns of a part, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmamba_cli.decoding.parts import read_part
from mmmamba_cli.decoding.plan import ModelPlan, ScanPlan
from mmmamba_cli.decoding.states import States
from mmmamba_cli.model import HolisticVLM

# Tokens of a part, all rows together, largest first: the more, the faster for each. The small one
# is short of work, so that a few of it take as long as one of the next.
TOKENS, SMALL, SMALL_FOR_NEXT = (16384, 4096), 512, 6
LEAST_COLUMNS = 64
# So many parts of one kind in a prompt are worth a graph; fewer, when they come for a second time.
ENOUGH = 6

Work = Callable[[], None]


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
    small = min(SMALL, large[-1])
    sizes, rest = [], length
    for columns in large:
        sizes += [columns] * (rest // columns)
        rest %= columns
    count = -(-rest // small)
    sizes += [large[-1]] if count >= SMALL_FOR_NEXT else [small] * count
    sizes.sort()
    in_front = sum(sizes) - length
    found, start = [], 0
    for columns in sizes:
        # Without padding a part is a little faster; a small one is not worth another graph.
        found.append(Kind(columns, columns == small or start < in_front + padding))
        start += columns
    return found


class PartReader:
    """Reads prompts into `states`, over which its graphs are made by `capture`."""

    def __init__(self, model: HolisticVLM, states: States, capture: Callable[[Work], Work]):
        self._model = model
        self._states = states
        self._capture = capture
        self._parts: dict[Kind, _Part] = {}
        # A part whose graph found no memory is its own: launched one by one, it needs less.
        self._graphs: dict[Kind, Work] = {}

    def read(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, D) of the prompt's last column, before the norm.

        Args:
            inputs: ids (B, T) of text, or what the first layer sees (B, T, D).
            mask: (B, T) bool, which columns are real, all padding at the left; None if all are.
        """
        batch, length = inputs.shape[:2]
        padding = 0 if mask is None else int((~mask).sum(1).max())
        kinds = cut(length, padding, batch)
        self._prepare(kinds)
        in_front = sum(kind.columns for kind in kinds) - length
        real = inputs.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
        padded = ~F.pad(real, (in_front, 0)).unsqueeze(-1)
        self._states.clear()
        start = 0
        for kind in kinds:
            part, stop = self._parts[kind], start + kind.columns
            # The first part is larger than what is missing.
            part.fill(self._embedded(inputs[:, max(0, start - in_front) : stop - in_front]))
            if part.padding is not None:
                part.padding.copy_(padded[:, start:stop])
            self._graphs.get(kind, part)()
            start = stop
        self._states.seen(length)
        return part.last

    def _embedded(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 3:
            return inputs
        return F.embedding(inputs, self._states.plan.text_embedding)

    def _prepare(self, kinds: list[Kind]) -> None:
        """Capture what is worth it; that runs parts, and leaves the states anyhow."""
        for kind, count in Counter(kinds).items():
            known = kind in self._parts
            part = self._parts.setdefault(kind, _Part(self._model, self._states, kind))
            if kind not in self._graphs and (known or count >= ENOUGH):
                try:
                    self._graphs[kind] = self._capture(part)
                except torch.OutOfMemoryError:
                    self._graphs[kind] = part


class _Part:
    """The work of one part: what `fill` puts in, and `padding` (B, N, 1); `last` (B, D) comes out.

    The work may write over its input, which is filled anew for each.
    """

    def __init__(self, model: HolisticVLM, states: States, kind: Kind):
        like, shape = states.plan.text_embedding, (states.batch, kind.columns)
        self._blocks = model.model.blocks
        self._states = states
        self._hidden = like.new_zeros(*shape, model.config.hidden_size)
        self.padding: Tensor | None = None
        if kind.padded:
            self.padding = like.new_zeros(*shape, 1, dtype=torch.bool)
        self.last = like.new_zeros(states.batch, model.config.hidden_size)

    def fill(self, hidden: Tensor) -> None:
        """What the first layer sees of the last columns (B, N or fewer, D); zeros before."""
        missing = self._hidden.shape[1] - hidden.shape[1]
        self._hidden[:, :missing].zero_()
        self._hidden[:, missing:].copy_(hidden)

    def __call__(self) -> None:
        plan, first, hidden = self._states.plan, 0, self._hidden
        for stack in self._states.stacks:
            blocks = self._blocks[first : first + len(stack.layers)]
            first += len(blocks)
            hidden = read_part(stack, blocks, hidden, None, None, self.padding)
            if stack.plan is plan.embedding and plan.normalize_embedding_output:
                hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        self.last.copy_(hidden[:, -1])
