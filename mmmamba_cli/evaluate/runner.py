"""Asking a model every question of a suite, in batches, from where it was stopped before."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

from mmmamba_cli.errors import CheckpointError, DataError, MmmambaError, name_some
from mmmamba_cli.evaluate.answer_cache import Answer, AnswerStore
from mmmamba_cli.evaluate.batching import MOST_PROMPTS, Limit, plan_batches
from mmmamba_cli.evaluate.interfaces import Encoded, EvalModel, OutOfMemory, Prompt

# Where nobody knows what fits, as on a CPU.
DEFAULT_PROMPTS = 8
# Batches whose pictures are decoded ahead of the model.
AHEAD = 2
WORKERS = 8


@dataclass
class Watch:
    """What the caller hears while a suite is run; each may do nothing."""

    say: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    advance: Callable[[int], None] = lambda more: None


@dataclass(frozen=True)
class Asked:
    """How it went, beside the answers: batches in order, by their sizes."""

    limit: Limit
    batches: list[int] = field(default_factory=list)
    halved: int = 0
    answered: int = 0
    # Rows that the model could not be asked, and why, such as a picture that is damaged.
    not_asked: Mapping[str, str] = field(default_factory=dict)


def ask_all(
    model: EvalModel,
    prompts: Sequence[Prompt],
    store: AnswerStore,
    *,
    max_new_tokens: int,
    batch: int | None,
    watch: Watch,
) -> Asked:
    """Answer every prompt that `store` has no answer to yet, and put the answers there.

    `batch` prompts at a time, or as many as fit (None). A batch that does not fit is halved, and
    all after it are as small; that is said once. A row that cannot be asked is left out and counted
    among those returned. Raises `MmmambaError` if a single prompt does not fit, `DataError` if no
    row can be asked.
    """
    watch.advance(sum(prompt.index in store.answers for prompt in prompts))
    todo = [prompt for prompt in prompts if prompt.index not in store.answers]
    if not todo:
        return Asked(store.limit or Limit(batch or DEFAULT_PROMPTS))
    lengths, refused = _measure(model, prompts)
    prompts = [prompt for prompt in prompts if prompt.index not in refused]
    _require_rows(prompts, refused)
    limit = _start_limit(model, prompts, lengths, store, batch, max_new_tokens, watch, refused)
    sizes: list[int] = []
    halved = 0
    with _Decoder(model) as decoder:
        while True:
            failed = _run_plan(
                model, prompts, lengths, store, max_new_tokens, decoder, watch, sizes, refused
            )
            if failed is None:
                break
            halved += 1
            limit = _smaller(limit, failed, lengths, halved, watch)
            store.set_limit(limit)
    _require_rows([prompt for prompt in prompts if prompt.index not in refused], refused)
    watch.advance(len(refused))
    reasons = {index: str(error) for index, error in refused.items()}
    return Asked(limit, sizes, halved, len(todo) - len(refused), reasons)


def _run_plan(
    model: EvalModel,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    store: AnswerStore,
    max_new_tokens: int,
    decoder: _Decoder,
    watch: Watch,
    sizes: list[int],
    refused: dict[str, DataError],
) -> list[int] | None:
    """Run the batches of the store's limit; the batch that did not fit, or None if all are done.

    Rows whose pictures turn out to be damaged are added to `refused`.

    The plan is that of when the limit was set, whatever was answered since, so that a run which
    was stopped makes the same batches as one that was not. A batch of which some are answered is
    done again as a whole.
    """
    assert store.limit is not None
    planned = [i for i, p in enumerate(prompts) if p.index not in store.before_limit]
    plan = plan_batches([lengths[i] for i in planned], store.limit)
    batches = [[planned[place] for place in batch] for batch in plan]
    done = {*store.answers, *refused}
    batches = [b for b in batches if any(prompts[i].index not in done for i in b)]
    for number, batch in enumerate(batches):
        for coming in batches[number : number + 1 + AHEAD]:
            decoder.order([prompts[i] for i in coming])
        encoded = decoder.take([prompts[i] for i in batch], refused)
        try:
            answers = _answer(model, encoded, max_new_tokens)
        except OutOfMemory:
            return batch
        new = [answer for answer in answers if answer.index not in store.answers]
        store.add(new)
        if encoded:
            sizes.append(len(encoded))
        decoder.drop([prompts[i] for i in batch])
        watch.advance(len(new))
    return None


def _answer(model: EvalModel, batch: list[Encoded], max_new_tokens: int) -> list[Answer]:
    chosen = [encoded for encoded in batch if encoded.prompt.choices]
    spoken = [encoded for encoded in batch if not encoded.prompt.choices]
    answers = []
    if chosen:
        for encoded, scores in zip(chosen, model.score_choices(chosen), strict=True):
            prompt = encoded.prompt
            # max() of a list with a NaN is whatever stands first.
            if any(math.isnan(score) for score in scores):
                raise CheckpointError(
                    f"row {prompt.index}: the model scores the choices as "
                    f"{', '.join(f'{score:g}' for score in scores)}",
                    "check its weights, or its --dtype",
                )
            best = scores.index(max(scores))
            answers.append(Answer(prompt.index, prompt.choices[best], tuple(scores)))
    if spoken:
        texts = model.generate(spoken, max_new_tokens)
        answers += [Answer(e.prompt.index, text) for e, text in zip(spoken, texts, strict=True)]
    return answers


def _measure(model: EvalModel, prompts: Sequence[Prompt]) -> tuple[list[int], dict[str, DataError]]:
    """The length of each prompt that can be measured, and what is wrong with the others."""
    lengths, refused = [], {}
    for prompt in prompts:
        try:
            lengths.append(model.measure(prompt))
        except DataError as error:
            refused[prompt.index] = error
    return lengths, refused


def _require_rows(prompts: Sequence[Prompt], refused: Mapping[str, DataError]) -> None:
    """Raise `DataError` if no row is left: then it is not a row that is wrong."""
    if prompts:
        return
    first = next(iter(refused.values()))
    if len(refused) == 1:
        raise first
    raise DataError(
        f"none of {len(refused)} rows can be asked ({name_some(refused)}): {first.message}",
        first.hint,
    )


def _start_limit(
    model: EvalModel,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    store: AnswerStore,
    batch: int | None,
    max_new_tokens: int,
    watch: Watch,
    refused: dict[str, DataError],
) -> Limit:
    """The limit to begin with, or to go on with, which is then the store's."""
    held = store.limit
    if held is not None and held.given == (batch or 0):
        return held
    if batch is not None:
        store.set_limit(Limit(batch, given=batch))
    else:
        longest, encoded = _longest(model, prompts, lengths, refused)
        try:
            columns = model.fitting_columns(encoded, max_new_tokens)
        except OutOfMemory as error:
            raise _too_long(lengths[longest]) from error
        if columns is None:
            store.set_limit(Limit(DEFAULT_PROMPTS))
        else:
            store.set_limit(Limit(MOST_PROMPTS, columns))
            fits = max(1, min(MOST_PROMPTS, columns // lengths[longest]))
            watch.say(f"batches of up to {columns:,} tokens fit: {fits} of the longest prompts")
    assert store.limit is not None
    return store.limit


def _longest(
    model: EvalModel,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    refused: dict[str, DataError],
) -> tuple[int, Encoded]:
    """The longest prompt that can be encoded, and its place; others are added to `refused`."""
    for place in sorted(range(len(prompts)), key=lambda i: (-lengths[i], i)):
        try:
            return place, model.encode(prompts[place])
        except DataError as error:
            refused[prompts[place].index] = error
    _require_rows([], refused)
    raise AssertionError("there are prompts")


def _smaller(
    limit: Limit, batch: list[int], lengths: Sequence[int], halved: int, watch: Watch
) -> Limit:
    if len(batch) == 1:
        raise _too_long(lengths[batch[0]])
    if halved == 1:
        watch.warn(
            f"a batch of {len(batch)} prompts did not fit into the device's memory; going on with "
            "smaller ones"
        )
    return limit.halved(len(batch), lengths[batch[0]])


def _too_long(length: int) -> MmmambaError:
    return MmmambaError(
        f"one prompt of {length:,} tokens does not fit into the device's memory",
        "try --max-tiles 6 or fewer, --dtype bf16, or another --device",
    )


class _Decoder(AbstractContextManager["_Decoder"]):
    """Encodes prompts in background threads, each once until it is dropped."""

    def __init__(self, model: EvalModel):
        self._model = model
        self._pool = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))
        self._coming: dict[str, Future[Encoded]] = {}

    def order(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.index not in self._coming:
                self._coming[prompt.index] = self._pool.submit(self._model.encode, prompt)

    def take(self, prompts: Sequence[Prompt], refused: dict[str, DataError]) -> list[Encoded]:
        """Those that can be encoded; the others are added to `refused`."""
        found = []
        for prompt in prompts:
            try:
                found.append(self._coming[prompt.index].result())
            except DataError as error:
                refused[prompt.index] = error
        return found

    def drop(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._coming.pop(prompt.index, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
