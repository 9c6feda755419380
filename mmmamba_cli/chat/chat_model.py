"""A model one can talk to: where it comes from, and its answer to a conversation.

One answer, token by token, so that it can be shown, stopped, and set beside another model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_cli.chat.conversation import Conversation
from mmmamba_cli.errors import DataError, MmmambaError
from mmmamba_cli.inference import Generator, Settings
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
    """The ids of an answer to input_ids (1, T), as they are made; the end is not handed on.

    The same tokens as `model.generate` takes greedily. Drawing depends on the seed and on `turn`,
    so that a question asked twice may be answered differently. `pixel_values` as in the model's
    forward. `generator` is the model's own and faster; None decodes any model by its forward.
    """
    settings = replace(settings, seed=(settings.seed + turn) % 2**63)
    if generator is None:
        ids = _forward(model, input_ids, pixel_values, settings)
    else:
        rows = generator.stream_answer((input_ids, pixel_values, None), settings)
        ids = (token for (token,) in rows)
    ends = eos_ids(settings, model.generation_config)
    for token in ids:
        if token in ends:
            return
        yield token


@dataclass
class _Row:
    """What a `Sampler` reads and writes, of one answer."""

    logits: Tensor
    ids: Tensor
    finished: Tensor


@torch.no_grad()
def _forward(
    model: HolisticVLM, input_ids: Tensor, pixel_values: Tensor | None, settings: Settings
) -> Iterator[int]:
    """What `Generator.stream` gives, by the model's forward."""
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
class Answer:
    """An answer as it grows; `finished` once the model ended it by itself."""

    text: str = ""
    tokens: int = 0
    finished: bool = False


@dataclass(frozen=True)
class ChatModel:
    """A loaded model under the name it is called by; it gives one answer at a time.

    `generator` decodes in the model's place; None for models that it does not take.
    """

    name: str
    model: HolisticVLM
    processor: HolisticVLMProcessor | HolisticTextProcessor
    kind: str
    final: bool | None
    generator: Generator | None = None

    @property
    def sees(self) -> bool:
        """Whether it can be shown pictures."""
        return not isinstance(self.processor, HolisticTextProcessor)

    def answer(
        self, conversation: Conversation, settings: Settings, found: Answer
    ) -> Iterator[str]:
        """The answer to the last question, in pieces of text; `found` keeps it as it grows.

        It ends where the tokenizer says a turn does, unless the settings name other ends.
        Raises `DataError` for pictures that cannot be read, or shown to this model, and for a
        conversation that its device has no memory for.
        """
        if conversation.pictures and not self.sees:
            raise DataError(
                f"{self.name} reads text only", "start again without --image, or use /reset"
            )
        batch = self.processor.chat(
            conversation.messages(self.name), conversation.pictures, padding=False
        )
        device, dtype = self.model.lm_head.weight.device, self.model.lm_head.weight.dtype
        pixels = batch.get("pixel_values")
        ends = frozenset(self.processor.stop_token_ids) if settings.eos is None else settings.eos
        ids = generate_ids(
            self.model,
            batch["input_ids"].to(device),
            None if pixels is None else pixels.to(device, dtype),
            replace(settings, eos=ends),
            turn=len(conversation.questions) - 1,
            generator=self.generator,
        )
        pieces: list[str] = []
        stream = TextStream(self.processor.tokenizer, pieces.append, skip_prompt=False)
        try:
            for token in ids:
                found.tokens += 1
                stream.put(torch.tensor([token]))
                yield from _taken(pieces, found)
        except torch.OutOfMemoryError as error:
            if self.generator is not None:
                self.generator.release()
            length = batch["input_ids"].shape[1] + found.tokens
            raise DataError(
                f"{self.name}: {device} has no memory left for a conversation of {length} tokens",
                "begin anew with /reset, or give --dtype bf16",
            ) from error
        stream.end()
        found.finished = found.tokens < settings.max_new_tokens
        yield from _taken(pieces, found)


def _taken(pieces: list[str], found: Answer) -> Iterator[str]:
    """The pieces that are there, as they are removed; none before the first that is no space."""
    for piece in pieces:
        shown = piece if found.text else piece.lstrip()
        found.text += shown
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
    """Load a model to chat with. `device` None is CUDA where there is one; dtype "auto" is bf16
    there, and fp32 on a CPU. Raises `CheckpointError` if it has no tokenizer.
    """
    processor = found.require_processor(
        "talked to", "put the teacher's tokenizer beside it, or seed again with --tokenizer FILE"
    )
    model = found.load(device, dtype)
    return ChatModel(found.name, model, processor, found.kind, found.final, _generator(model))


def _generator(model: HolisticVLM) -> Generator | None:
    """None for a model that is not packed as it is, as with adapters: its own forward answers."""
    try:
        return Generator(model)
    except MmmambaError:
        return None
