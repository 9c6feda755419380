"""Text prompts of a model without attention, in parts of fixed sizes, each one CUDA graph.

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

    def read(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, D) of the last column of ids (B, T), before the norm.

        `mask` (B, T) bool marks real tokens, all padding at the left; None if all are real.
        """
        batch, length = input_ids.shape
        padding = 0 if mask is None else int((~mask).sum(1).max())
        kinds = cut(length, padding, batch)
        self._prepare(kinds)
        in_front = sum(kind.columns for kind in kinds) - length
        ids = F.pad(input_ids, (in_front, 0))
        real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        padded = ~F.pad(real, (in_front, 0)).unsqueeze(-1)
        self._states.clear()
        start = 0
        for kind in kinds:
            part, columns = self._parts[kind], slice(start, start + kind.columns)
            part.ids.copy_(ids[:, columns])
            if part.padding is not None:
                part.padding.copy_(padded[:, columns])
            self._graphs.get(kind, part)()
            start += kind.columns
        self._states.seen(length)
        return part.last

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
    """The work of one part: `ids` (B, N) and `padding` (B, N, 1) go in, `last` (B, D) comes out."""

    def __init__(self, model: HolisticVLM, states: States, kind: Kind):
        batch, like = states.batch, states.ids
        self._blocks = model.model.blocks
        self._states = states
        self.ids = like.new_zeros(batch, kind.columns)
        self.padding: Tensor | None = None
        if kind.padded:
            self.padding = torch.zeros_like(self.ids, dtype=torch.bool).unsqueeze(-1)
        self.last = states.plan.text_embedding.new_zeros(batch, model.config.hidden_size)

    def __call__(self) -> None:
        plan, first = self._states.plan, 0
        hidden = F.embedding(self.ids, plan.text_embedding)
        for stack in self._states.stacks:
            blocks = self._blocks[first : first + len(stack.layers)]
            first += len(blocks)
            hidden = read_part(stack, blocks, hidden, None, None, self.padding)
            if stack.plan is plan.embedding and plan.normalize_embedding_output:
                hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        self.last.copy_(hidden[:, -1])
