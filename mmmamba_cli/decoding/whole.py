"""Prompts of models with attention, whole: each number of columns, rounded up, one CUDA graph.

A causal flag is all of the mask only where a prompt passes whole, and what is missing to a round
number of columns stands behind it, where no real token sees it. It leaves no trace in the memory of
Mamba-2 layers, and in that of attention lies where the next tokens' keys and values come to lie.
Longer prompts keep the device busy for longer than the host takes to launch them one by one.
Legend: B batch, T columns of the prompt, N columns of the graph, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmamba_cli.decoding.graphs import Capture, Works
from mmmamba_cli.decoding.keeping import PrefillCache
from mmmamba_cli.decoding.parts import Padding, embedded, read_stacks
from mmmamba_cli.decoding.plan import AttentionPlan, ModelPlan
from mmmamba_cli.decoding.states import States
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.rope import depends_on_length
from mmmamba_cli.model.sequence import StackState, describe_columns

# Tokens of a prompt, all rows together, that a graph is made for at most; what N is a multiple of.
MOST, ROUNDED_TO = 8192, 128


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
            describe_columns(
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
    return -(-length // ROUNDED_TO) * ROUNDED_TO
