"""Batched, resumable inference of a model over the prompts of a suite."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from mmmamba_cli.devices import OutOfMemory
from mmmamba_cli.errors import CheckpointError, DataError, DeviceMemoryError, name_some
from mmmamba_cli.evaluate.answer_cache import AnswerCache, AnswerRecord
from mmmamba_cli.evaluate.batching import MAX_BATCH_SIZE, BatchLimit, plan_batches
from mmmamba_cli.evaluate.interfaces import EncodedPrompt, EvalModel, EvalPrompt
from mmmamba_cli.evaluate.process_group import SINGLE_PROCESS, ProcessGroup, run_on_all

# Used if the device cannot tell what fits, for example on a CPU.
DEFAULT_BATCH_SIZE = 8
# Batches encoded ahead of the model in background threads.
PREFETCH_BATCHES = 2
MAX_ENCODER_THREADS = 8


@contextmanager
def _no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda more: None


@contextmanager
def _no_message(message: str | Callable[[], str]) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class EvalCallbacks:
    """Callbacks of an evaluation; by default they do nothing.

    `say` and `warn` take a sentence, `advance` the number of new answers. `progress(title, total)`
    returns a context manager that yields an `advance`, `timed(title)` one that prints the title
    with the time if the step takes long, `if_interrupted(message)` one that prints the message on
    `KeyboardInterrupt` and re-raises it. `is_stopped` says after
    each batch whether to stop: every process then raises `EvalStopped`.
    """

    say: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    advance: Callable[[int], None] = lambda more: None
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = _no_progress
    timed: Callable[[str], AbstractContextManager[None]] = _no_message
    if_interrupted: Callable[[str | Callable[[], str]], AbstractContextManager[None]] = _no_message
    is_stopped: Callable[[], bool] = lambda: False


class EvalStopped(KeyboardInterrupt):
    """`EvalCallbacks.is_stopped` was true on some process; the answers so far are in the cache."""


def raise_if_stopped(group: ProcessGroup, callbacks: EvalCallbacks) -> None:
    """Raise `EvalStopped` on every process if one of them is to stop."""
    if any(group.all_gather([callbacks.is_stopped()])):
        raise EvalStopped


@dataclass(frozen=True)
class InferenceStats:
    """Batch sizes in order, halvings after out of memory, and the number of new answers."""

    limit: BatchLimit
    batch_sizes: list[int] = field(default_factory=list)
    halvings: int = 0
    answered: int = 0
    # Rows that could not be asked, for example because of a damaged picture, and the reason.
    not_asked: Mapping[str, str] = field(default_factory=dict)


def answer_prompts(
    model: EvalModel,
    prompts: Sequence[EvalPrompt],
    cache: AnswerCache,
    *,
    max_new_tokens: int,
    batch: int | None,
    callbacks: EvalCallbacks,
    group: ProcessGroup = SINGLE_PROCESS,
) -> InferenceStats:
    """Answer every prompt without a cached answer, and add the answers to `cache`.

    `batch` is the number of prompts per batch; None uses as many as fit. After out of memory the
    limit is halved for all further batches, with one warning. Rows that cannot be asked are skipped
    and returned with the reason.

    The processes of `group` get whole batches of the plan of a single process, in steps of one
    batch each. Batches of a step are neighbours in the order of length, so that the processes end
    a step at about the same time. Answers, cache and statistics are those of a single process.

    Raises:
        DeviceMemoryError: if a single prompt does not fit.
        DataError: if no row can be asked.
        EvalStopped: if `callbacks.is_stopped` on some process.
    """
    raise_if_stopped(group, callbacks)
    callbacks.advance(sum(prompt.index in cache.answers for prompt in prompts))
    todo = [prompt for prompt in prompts if prompt.index not in cache.answers]
    if not todo:
        return InferenceStats(cache.limit or BatchLimit(batch or DEFAULT_BATCH_SIZE))
    # The plan of batches must be the same on all processes: process 0 reads and measures.
    lengths, refused = group.run_on_main(lambda: _prompt_lengths(model, prompts))
    prompts = [prompt for prompt in prompts if prompt.index not in refused]
    limit, refused = group.run_on_main(
        lambda: _start_limit(
            model, prompts, lengths, cache.limit, batch, max_new_tokens, callbacks, refused
        )
    )
    if limit != cache.limit:
        cache.set_limit(limit)
    sizes: list[int] = []
    halved = 0
    with _PromptEncoder(model) as encoder:
        while True:
            failed = _run_plan(
                model,
                prompts,
                lengths,
                cache,
                max_new_tokens,
                encoder,
                callbacks,
                sizes,
                refused,
                group,
            )
            if failed is None:
                break
            halved += 1
            limit = _smaller(limit, failed, lengths, halved, callbacks, group)
            cache.set_limit(limit)
    left = [prompt for prompt in prompts if prompt.index not in refused]
    group.run_on_main(lambda: _require_rows(left, refused))
    callbacks.advance(len(refused))
    reasons = {index: str(error) for index, error in refused.items()}
    return InferenceStats(limit, sizes, halved, len(todo) - len(refused), reasons)


def _run_plan(
    model: EvalModel,
    prompts: Sequence[EvalPrompt],
    lengths: Sequence[int],
    cache: AnswerCache,
    max_new_tokens: int,
    encoder: _PromptEncoder,
    callbacks: EvalCallbacks,
    sizes: list[int],
    refused: dict[str, DataError],
    group: ProcessGroup,
) -> list[int] | None:
    """Run the batches of the cache's limit; return the batch that did not fit, None if all fit.

    Rows with damaged pictures are added to `refused`.

    The batches are planned over the rows that were unanswered when the limit was set, so that a
    resumed evaluation has the same batches as an uninterrupted one. A partly answered batch is
    repeated as a whole.
    """
    assert cache.limit is not None
    planned = [i for i, p in enumerate(prompts) if p.index not in cache.before_limit]
    plan = plan_batches([lengths[i] for i in planned], cache.limit)
    batches = [[prompts[planned[place]] for place in batch] for batch in plan]
    done = {*cache.answers, *refused}
    numbers = [n for n, b in enumerate(batches) if any(prompt.index not in done for prompt in b)]
    ahead = group.size * (1 + PREFETCH_BATCHES)
    for first in range(0, len(numbers), group.size):
        step = numbers[first : first + group.size]
        own = [batches[n] for n in numbers[first : first + ahead][group.rank :: group.size]]
        found = run_on_all(group, partial(_answer_next, model, own, max_new_tokens, encoder))
        for number, part in zip(step, group.all_gather([found])[: len(step)], strict=True):
            refused.update(part.refused)
            if part.answers is None:
                # Answers of later batches are dropped: a single process would not have asked them.
                if group.size > 1:
                    encoder.discard(prompts)
                return [planned[place] for place in plan[number]]
            new = [answer for answer in part.answers if answer.index not in cache.answers]
            cache.add(new)
            if part.answers:
                sizes.append(len(part.answers))
            callbacks.advance(len(new))
        raise_if_stopped(group, callbacks)
    return None


@dataclass(frozen=True)
class _BatchOutcome:
    """The answers to a batch, None if it did not fit into memory, and the rows not readable."""

    answers: list[AnswerRecord] | None
    refused: dict[str, DataError] = field(default_factory=dict)


def _answer_next(
    model: EvalModel,
    batches: Sequence[Sequence[EvalPrompt]],
    max_new_tokens: int,
    encoder: _PromptEncoder,
) -> _BatchOutcome:
    """Answer the first of the batches, if there is one; encode the others in the background."""
    for coming in batches:
        encoder.prefetch(coming)
    if not batches:
        return _BatchOutcome([])
    refused: dict[str, DataError] = {}
    encoded = encoder.results(batches[0], refused)
    try:
        answers = _answer_batch(model, encoded, max_new_tokens)
    except OutOfMemory:
        return _BatchOutcome(None, refused)
    encoder.discard(batches[0])
    return _BatchOutcome(answers, refused)


def _answer_batch(
    model: EvalModel, batch: list[EncodedPrompt], max_new_tokens: int
) -> list[AnswerRecord]:
    chosen = [encoded for encoded in batch if encoded.prompt.choices]
    spoken = [encoded for encoded in batch if not encoded.prompt.choices]
    answers = []
    if chosen:
        for encoded, scores in zip(chosen, model.score_choices(chosen), strict=True):
            prompt = encoded.prompt
            # max() of a list with NaN depends on the order.
            if any(math.isnan(score) for score in scores):
                raise CheckpointError(
                    f"row {prompt.index}: the model scores the choices as "
                    f"{', '.join(f'{score:g}' for score in scores)}",
                    "check its weights, or its --dtype",
                )
            ranked = scores
            if prompt.by_length:
                lengths = [max(1, len(choice.encode())) for choice in prompt.choices]
                ranked = [score / n for score, n in zip(scores, lengths, strict=True)]
            best = ranked.index(max(ranked))
            answers.append(AnswerRecord(prompt.index, prompt.choices[best], tuple(scores)))
    if spoken:
        texts = model.generate(spoken, max_new_tokens)
        answers += [
            AnswerRecord(e.prompt.index, text) for e, text in zip(spoken, texts, strict=True)
        ]
    return answers


def _prompt_lengths(
    model: EvalModel, prompts: Sequence[EvalPrompt]
) -> tuple[list[int], dict[str, DataError]]:
    """The lengths of the readable prompts, and the errors of the others by index.

    Raises `DataError` if none is readable.
    """
    lengths: list[int] = []
    refused: dict[str, DataError] = {}
    for prompt in prompts:
        try:
            lengths.append(model.prompt_length(prompt))
        except DataError as error:
            refused[prompt.index] = error
    _require_rows(lengths, refused)
    return lengths, refused


def _require_rows(left: Sequence[object], refused: Mapping[str, DataError]) -> None:
    """Raise `DataError` if no row is left: the cause is not a single row."""
    if left:
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
    prompts: Sequence[EvalPrompt],
    lengths: Sequence[int],
    held: BatchLimit | None,
    batch: int | None,
    max_new_tokens: int,
    callbacks: EvalCallbacks,
    refused: dict[str, DataError],
) -> tuple[BatchLimit, dict[str, DataError]]:
    """The cached limit `held` if it still applies, else a new one; and the rows not readable."""
    if held is not None and held.given == (batch or 0):
        return held, refused
    if batch is not None:
        return BatchLimit(batch, given=batch), refused
    longest, encoded = _longest(model, prompts, lengths, refused)
    try:
        columns = model.max_batch_tokens(encoded, max_new_tokens)
    except OutOfMemory as error:
        raise _too_long(lengths[longest]) from error
    if columns is None:
        return BatchLimit(DEFAULT_BATCH_SIZE), refused
    fits = max(1, min(MAX_BATCH_SIZE, columns // lengths[longest]))
    callbacks.say(f"batches of up to {columns:,} tokens fit: {fits} of the longest prompts")
    return BatchLimit(MAX_BATCH_SIZE, columns), refused


def _longest(
    model: EvalModel,
    prompts: Sequence[EvalPrompt],
    lengths: Sequence[int],
    refused: dict[str, DataError],
) -> tuple[int, EncodedPrompt]:
    """The longest prompt that can be encoded, and its position; the rest goes to `refused`."""
    for place in sorted(range(len(prompts)), key=lambda i: (-lengths[i], i)):
        try:
            return place, model.encode(prompts[place])
        except DataError as error:
            refused[prompts[place].index] = error
    _require_rows([], refused)
    raise AssertionError("there are prompts")


def _smaller(
    limit: BatchLimit,
    batch: list[int],
    lengths: Sequence[int],
    halved: int,
    callbacks: EvalCallbacks,
    group: ProcessGroup,
) -> BatchLimit:
    if len(batch) == 1:
        error = _too_long(lengths[batch[0]])
        error.is_reported_elsewhere = not group.is_main
        raise error
    if halved == 1:
        callbacks.warn(
            f"a batch of {len(batch)} prompts did not fit into the device's memory; going on with "
            "smaller ones"
        )
    return limit.halved(len(batch), lengths[batch[0]])


def _too_long(length: int) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"one prompt of {length:,} tokens does not fit into the device's memory",
        "try --max-tiles 6 or fewer, --dtype bf16, or another --device",
    )


class _PromptEncoder(AbstractContextManager["_PromptEncoder"]):
    """Encodes prompts in background threads and keeps them until they are discarded."""

    def __init__(self, model: EvalModel):
        self._model = model
        self._pool = ThreadPoolExecutor(min(MAX_ENCODER_THREADS, os.cpu_count() or 1))
        self._pending: dict[str, Future[EncodedPrompt]] = {}

    def prefetch(self, prompts: Sequence[EvalPrompt]) -> None:
        for prompt in prompts:
            if prompt.index not in self._pending:
                self._pending[prompt.index] = self._pool.submit(self._model.encode, prompt)

    def results(
        self, prompts: Sequence[EvalPrompt], refused: dict[str, DataError]
    ) -> list[EncodedPrompt]:
        """The encoded prompts; those that cannot be encoded are added to `refused`."""
        found = []
        for prompt in prompts:
            try:
                found.append(self._pending[prompt.index].result())
            except DataError as error:
                refused[prompt.index] = error
        return found

    def discard(self, prompts: Sequence[EvalPrompt]) -> None:
        for prompt in prompts:
            self._pending.pop(prompt.index, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
