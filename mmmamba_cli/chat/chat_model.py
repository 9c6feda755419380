"""A loaded model that answers a conversation, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmmamba_cli.chat.conversation import Conversation
from mmmamba_cli.errors import DataError
from mmmamba_cli.inference import Generator, Settings, make_generator
from mmmamba_cli.inference.sampling import Sampler, eos_ids
from mmmamba_cli.model import HolisticVLM, new_cache
from mmmamba_cli.processing import HolisticTextProcessor, HolisticVLMProcessor, TextStream
from mmmamba_cli.runs import ResolvedModel, Run, check_unique_names, resolve_model


def generate_ids(
    model: HolisticVLM,
    input_ids: Tensor,
    pixel_values: Tensor | None,
    settings: Settings,
    turn: int = 0,
    generator: Generator | None = None,
) -> Iterator[int]:
    """Generate the token ids of one answer; the stop token is not yielded.

    Greedy ids equal those of `model.generate`. Sampling is seeded with `settings.seed + turn`, so
    that a repeated question may get another answer.

    Args:
        input_ids: the prompt, (1, T).
        pixel_values: image tiles (N, 3, S, S) or None.
        turn: index of the question in its conversation.
        generator: the fast decoder of this model; None decodes with the model's forward.
    """
    settings = replace(settings, seed=(settings.seed + turn) % 2**63)
    if generator is None:
        ids = _decode_by_forward(model, input_ids, pixel_values, settings)
    else:
        rows = generator.stream_answer((input_ids, pixel_values, None), settings)
        ids = (token for (token,) in rows)
    stop_ids = eos_ids(settings, model.generation_config)
    for token in ids:
        if token in stop_ids:
            return
        yield token


@dataclass
class _Row:
    """Sampler state of one answer: logits (1, V), ids (1,), finished (1,)."""

    logits: Tensor
    ids: Tensor
    finished: Tensor


@torch.no_grad()
def _decode_by_forward(
    model: HolisticVLM, input_ids: Tensor, pixel_values: Tensor | None, settings: Settings
) -> Iterator[int]:
    """Yield what `Generator.stream` yields, for models that it cannot pack."""
    cache = new_cache(model.config)
    logits = model(
        input_ids, pixel_values=pixel_values, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
    row = _Row(
        logits, input_ids[:, -1].clone(), torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    )
    sampler = Sampler(logits.shape[-1], logits.device)
    sampler.configure(settings, model.generation_config)
    for count in range(settings.max_new_tokens):
        if count > 0:
            row.logits = model(row.ids.unsqueeze(1), past_key_values=cache).logits[:, -1]
        sampler.sample(row, settings.mode)
        yield int(row.ids)


@dataclass
class ChatAnswer:
    """An answer while it is generated; `finished` once the model emitted a stop token."""

    text: str = ""
    tokens: int = 0
    finished: bool = False


class AnsweringModel(Protocol):
    """A loaded model of any kind that answers a conversation: see `ChatModel`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def final(self) -> bool | None: ...
    @property
    def has_vision(self) -> bool: ...
    @property
    def model(self) -> PreTrainedModel: ...
    def answer(
        self, conversation: Conversation, settings: Settings, answer: ChatAnswer
    ) -> Iterator[str]: ...


@dataclass(frozen=True)
class ChatModel:
    """A loaded model under its name; it generates one answer at a time.

    `generator` is its fast decoder, None for models that cannot be packed.
    """

    name: str
    model: HolisticVLM
    processor: HolisticVLMProcessor | HolisticTextProcessor
    kind: str
    final: bool | None
    generator: Generator | None = None

    @property
    def has_vision(self) -> bool:
        return not isinstance(self.processor, HolisticTextProcessor)

    def answer(
        self, conversation: Conversation, settings: Settings, answer: ChatAnswer
    ) -> Iterator[str]:
        """Stream the answer to the last question as pieces of text; `answer` accumulates it.

        The answer ends at the tokenizer's stop tokens unless `settings.eos` is given.

        Raises:
            DataError: unreadable pictures, pictures for a text-only model, or a conversation that
                does not fit into the device's memory.
        """
        if conversation.pictures and not self.has_vision:
            raise DataError(
                f"{self.name} reads text only", "start again without --image, or use /reset"
            )
        batch = self.processor.chat(
            conversation.messages(self.name), conversation.pictures, padding=False
        )
        device, dtype = self.model.lm_head.weight.device, self.model.lm_head.weight.dtype
        pixels = batch.get("pixel_values")
        eos = frozenset(self.processor.stop_token_ids) if settings.eos is None else settings.eos
        ids = generate_ids(
            self.model,
            batch["input_ids"].to(device),
            None if pixels is None else pixels.to(device, dtype),
            replace(settings, eos=eos),
            turn=len(conversation.questions) - 1,
            generator=self.generator,
        )
        pieces: list[str] = []
        stream = TextStream(self.processor.tokenizer, pieces.append, skip_prompt=False)
        try:
            for token in ids:
                answer.tokens += 1
                stream.put(torch.tensor([token]))
                yield from drain(pieces, answer)
        except torch.OutOfMemoryError as error:
            if self.generator is not None:
                self.generator.release()
            length = batch["input_ids"].shape[1] + answer.tokens
            raise DataError(
                f"{self.name}: {device} has no memory left for a conversation of {length} tokens",
                "start again with /reset, or give --dtype bf16",
            ) from error
        stream.end()
        answer.finished = answer.tokens < settings.max_new_tokens
        yield from drain(pieces, answer)


def drain(pieces: list[str], answer: ChatAnswer) -> Iterator[str]:
    """Move the pieces to the answer and yield them, without the answer's leading white space."""
    for piece in pieces:
        shown = piece if answer.text else piece.lstrip()
        answer.text += shown
        if shown:
            yield shown
    pieces.clear()


def resolve_models(
    run: Run, names: Sequence[str | Path], teacher_path: Path | None = None
) -> list[ResolvedModel]:
    """Open models by name as `resolve_model` does. Raises `DataError` if two have one name."""
    found = [resolve_model(run, name, teacher_path) for name in names]
    check_unique_names(
        [one.name for one in found], hint="name each of them once, or rename a folder"
    )
    return found


def load_chat_model(
    found: ResolvedModel, device: str | None = None, dtype: str = "auto"
) -> ChatModel:
    """Load a `HolisticVLM` to chat with. Raises `CheckpointError` if it has no tokenizer.

    `device` None is CUDA where there is one; dtype "auto" is bf16 there, and fp32 on a CPU.
    """
    processor = found.require_processor(
        "talked to", "put the teacher's tokenizer beside it, or seed again with --tokenizer FILE"
    )
    model = found.load(device, dtype)
    return ChatModel(found.name, model, processor, found.kind, found.final, make_generator(model))
