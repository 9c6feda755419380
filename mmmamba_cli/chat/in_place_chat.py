"""A student of a transformers model, or its teacher, that answers a conversation.

transformers' `generate` decodes in a thread, so that pieces of text are shown as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from mmmamba_cli.chat.chat_model import AnsweringModel, ChatAnswer, drain, load_chat_model
from mmmamba_cli.chat.conversation import Conversation
from mmmamba_cli.checkpoint import (
    InPlaceCheckpoint,
    load_in_place_model,
    load_in_place_processor,
)
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.inference import Settings
from mmmamba_cli.inference.sampling import eos_ids
from mmmamba_cli.processing import TextStream, as_id_set
from mmmamba_cli.processing.family_prompts import encode_conversation, place_inputs
from mmmamba_cli.runs import ResolvedModel, pick_placement


@dataclass(frozen=True)
class InPlaceChatModel:
    """A loaded model of transformers under its name; see `ChatModel`.

    `processor` is the family's, or a tokenizer where `has_vision` is false.
    """

    name: str
    model: Any
    processor: Any
    kind: str
    final: bool | None
    has_vision: bool

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer if self.has_vision else self.processor

    def answer(
        self, conversation: Conversation, settings: Settings, answer: ChatAnswer
    ) -> Iterator[str]:
        """Stream the answer to the last question as pieces of text; `answer` accumulates it.

        The answer ends at the stop tokens of the generation config and the tokenizer, unless
        `settings.eos` is given.

        Raises:
            DataError: as `ChatModel.answer`, or no chat template.
        """
        inputs = self._inputs(conversation)
        turn = len(conversation.questions) - 1
        settings = replace(settings, seed=(settings.seed + turn) % 2**63)
        eos = self._stop_ids() if settings.eos is None else frozenset(eos_ids(settings, None))
        pieces: list[str] = []
        stream = TextStream(self.tokenizer, pieces.append, skip_prompt=False)
        decoding = _Decoding(self.model, inputs, settings, eos)
        try:
            for token in decoding.run():
                if token in eos:
                    continue
                answer.tokens += 1
                stream.put(torch.tensor([token]))
                yield from drain(pieces, answer)
        except torch.OutOfMemoryError as error:
            length = inputs["input_ids"].shape[1] + answer.tokens
            raise DataError(
                f"{self.name}: {self.model.device} has no memory left for a conversation of "
                f"{length} tokens",
                "start again with /reset, or give --dtype bf16",
            ) from error
        stream.end()
        answer.finished = answer.tokens < settings.max_new_tokens
        yield from drain(pieces, answer)

    def _inputs(self, conversation: Conversation) -> dict[str, Any]:
        """The inputs of the model for the conversation up to its last question."""
        if conversation.pictures and not self.has_vision:
            raise DataError(
                f"{self.name} reads text only", "start again without --image, or use /reset"
            )
        batch = encode_conversation(
            self.processor,
            conversation.messages(self.name),
            conversation.pictures,
            has_vision=self.has_vision,
        )
        return place_inputs(batch, self.model.device, self.model.dtype)

    def _stop_ids(self) -> frozenset[int]:
        stated = as_id_set(self.model.generation_config.eos_token_id)
        return frozenset(stated | as_id_set(self.tokenizer.eos_token_id))


class _StopOnEvent(StoppingCriteria):
    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        return torch.full(
            (input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device
        )


class _TokenQueue(BaseStreamer):
    """Puts generated ids into a queue; the first call of `generate` holds the prompt."""

    def __init__(self, tokens: SimpleQueue[int | BaseException | None]) -> None:
        self.tokens = tokens
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                self.tokens.put(token)
        self.is_prompt = False

    def end(self) -> None:
        """The queue ends when `generate` has returned."""


class _Draw(LogitsProcessor):
    """Logits whose largest is a token drawn from their softmax, by the Gumbel-max trick.

    `generate` samples with torch's global generator, which models that answer side by side share.
    """

    def __init__(self, seed: int, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores.log_softmax(-1) - drawn.log()


def _sampling(settings: Settings, device: torch.device) -> LogitsProcessorList:
    """Temperature, top k, top p and the draw; empty for greedy decoding."""
    found = LogitsProcessorList()
    if settings.temperature > 0:
        found.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            found.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            found.append(TopPLogitsWarper(settings.top_p))
        found.append(_Draw(settings.seed, device))
    return found


@dataclass
class _Decoding:
    """One answer decoded by `generate` in a thread."""

    model: Any
    inputs: dict[str, Any]
    settings: Settings
    eos: frozenset[int]
    tokens: SimpleQueue[int | BaseException | None] = field(default_factory=SimpleQueue)
    stopped: Event = field(default_factory=Event)

    def run(self) -> Iterator[int]:
        """Yield the tokens, the stop token included; a closed iterator ends the thread."""
        thread = Thread(target=self._generate, daemon=True)
        thread.start()
        try:
            while (token := self.tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            self.stopped.set()
            thread.join()

    def _generate(self) -> None:
        try:
            self.model.generate(
                **self.inputs,
                # `_Draw` samples where the temperature is above 0.
                do_sample=False,
                logits_processor=_sampling(self.settings, self.model.device),
                max_new_tokens=self.settings.max_new_tokens,
                eos_token_id=sorted(self.eos) or None,
                streamer=_TokenQueue(self.tokens),
                stopping_criteria=StoppingCriteriaList([_StopOnEvent(self.stopped)]),
            )
        except BaseException as error:  # noqa: BLE001  raised again by `run`
            self.tokens.put(error)
        else:
            self.tokens.put(None)


def load_any_chat_model(
    found: ResolvedModel, device: str | None = None, dtype: str = "auto"
) -> AnsweringModel:
    """Load a model of any kind to chat with; see `load_chat_model`.

    Raises:
        CheckpointError: it has no processor, or the processor needs a library that is missing.
    """
    opened = found.opened
    if not isinstance(opened, InPlaceCheckpoint):
        return load_chat_model(found, device, dtype)
    processor = load_in_place_processor(opened)
    if processor is None:
        raise CheckpointError(
            f"{opened.path} has no processor, so it cannot be talked to",
            "put the processor's and the tokenizer's files of its teacher beside it",
        )
    place, kind = pick_placement(device, dtype)
    model = load_in_place_model(opened, device=place, dtype=kind, frozen=True)
    return InPlaceChatModel(
        found.name, model, processor, found.kind, found.final, opened.has_vision
    )
