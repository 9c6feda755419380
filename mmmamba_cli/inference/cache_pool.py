"""States kept with the graphs captured over them, for the next prompt of their size."""

from __future__ import annotations

from collections.abc import Callable

from mmmamba_cli.inference.cuda_graphs import GraphPool
from mmmamba_cli.inference.decode_step import advance
from mmmamba_cli.inference.graph_prefill import PartReader, WholeReader, suits, suits_whole
from mmmamba_cli.inference.packed_model import ModelPlan
from mmmamba_cli.inference.prefill import Reader
from mmmamba_cli.inference.sampling import Choice, Chooser
from mmmamba_cli.inference.static_cache import States, states_size
from mmmamba_cli.model import HolisticVLM

# How many are kept, and their bytes together; the one in use may be larger.
MOST, MOST_BYTES = 4, 2 * 2**30

Step = Callable[[], None]


class Shelf:
    """States by batch and room, and what advances each of them by a token."""

    def __init__(
        self, model: HolisticVLM, plan: ModelPlan, chooser: Chooser, graphs: bool, backend: str
    ):
        self._model = model
        self._plan = plan
        self._chooser = chooser
        self._graphs = graphs
        self._backend = backend
        self._pool: GraphPool | None = None
        self._states: dict[tuple[int, tuple[int, ...]], States] = {}
        self._steps: dict[tuple[States, Choice | None], Step] = {}
        self._readers: dict[States, Reader] = {}

    def take(
        self, batch: int, rooms: tuple[int, ...], choice: Choice | None
    ) -> tuple[States, Step]:
        """States that hold whatever they held, and a step that advances them.

        The step reads a token and, with a `choice`, chooses the next. Capturing one runs it a few
        times.
        """
        states = self._states.pop((batch, rooms), None)
        if states is None:
            self._make_way(states_size(self._plan, batch, rooms))
            states = States(self._plan, batch, rooms)
        # The last in order is the last that was used.
        self._states[batch, rooms] = states
        step = self._steps.get((states, choice))
        if step is None:
            step = self._steps[states, choice] = self._made(states, choice)
        return states, step

    def reader(self, states: States) -> Reader | None:
        """What reads prompts into these states by graphs, if that is how this model is read."""
        if not (self._graphs and suits_whole(self._plan)):
            return None
        if states not in self._readers:
            kind = PartReader if suits(self._plan) else WholeReader
            self._readers[states] = kind(self._model, states, self._captured)
        return self._readers[states]

    def clear(self) -> None:
        self._steps.clear()
        self._readers.clear()
        self._states.clear()
        self._pool = None

    def _made(self, states: States, choice: Choice | None) -> Step:
        def step() -> None:
            advance(states, self._backend)
            if choice is not None:
                self._chooser.choose(states, choice)

        if not self._graphs:
            return step
        # Whatever was there before, warming up wants room for its few columns.
        states.clear()
        return self._captured(step)

    def _captured(self, work: Step) -> Step:
        if self._pool is None:
            self._pool = GraphPool(self._plan.text_embedding.device)
        return self._pool.capture(work, self._chooser.rng)

    def _make_way(self, size: int) -> None:
        """Let go of the oldest until there is room for states of `size` bytes."""
        while self._states and (
            len(self._states) >= MOST
            or size + sum(states.nbytes for states in self._states.values()) > MOST_BYTES
        ):
            oldest = self._states.pop(next(iter(self._states)))
            self._steps = {key: step for key, step in self._steps.items() if key[0] is not oldest}
            self._readers.pop(oldest, None)
        if not self._states:
            # A pool that no graph uses any more is not taken up again.
            self.clear()
