"""Evaluation adapter of transformers' models: teachers and students with mixers in their place.

Prompts are those of the family's own processor and chat template. Legend: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from mmmamba_cli.checkpoint import (
    InPlaceCheckpoint,
    load_in_place_model,
    load_in_place_processor,
)
from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.errors import CheckpointError, DataError
from mmmamba_cli.evaluate.batch_memory import measure_batch_tokens
from mmmamba_cli.evaluate.choice_scores import (
    ChoiceTail,
    choice_scores,
    later_token_scores,
    padded_tails,
)
from mmmamba_cli.evaluate.fingerprint import file_digest
from mmmamba_cli.evaluate.interfaces import EncodedPrompt, EvalPrompt, ModelIdentity
from mmmamba_cli.evaluate.model_identity import identify
from mmmamba_cli.model.cache import CACHE_NAME
from mmmamba_cli.processing import (
    RenderedPrompt,
    TeacherProcessor,
    as_id_set,
    place_inputs,
    processor_digest,
    takes_max_tiles,
    with_max_tiles,
)
from mmmamba_cli.processing.prompt_turns import PromptTurn, question_turn
from mmmamba_cli.runs import ResolvedModel, pick_placement
from mmmamba_cli.teachers import text_config

T = TypeVar("T")

# Names the tokens that end an answer.
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class _Question:
    """A prompt as text with its pictures, and the processor with its limit of tiles."""

    turn: PromptTurn
    rendered: RenderedPrompt
    pictures: tuple[Image.Image, ...]
    processor: TeacherProcessor


class InPlaceAdapter:
    """A model of transformers and its family's processor as an `EvalModel`.

    Answers are greedy, with the model's own cache. The processor runs once for a batch, since
    families stack the pictures of several rows in different ways.
    """

    def __init__(self, model: Any, processor: TeacherProcessor, identity: ModelIdentity):
        self.model = model
        self.processor = processor
        self.identity = identity
        stated = as_id_set(model.generation_config.eos_token_id)
        tokenizer = processor.tokenizer
        self.stop_ids = sorted(
            stated | as_id_set(tokenizer.eos_token_id) | processor.end_of_answer_ids
        )
        # Suites need greedy decoding: ignore the checkpoint's sampling settings and penalties. No
        # pixels belong to a picture's placeholder in an answer.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=self.stop_ids or None,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=sorted(processor.picture_ids) or None,
        )
        self._limited: dict[int, TeacherProcessor] = {}
        # Tokenizers refuse to encode in one thread while another sets their padding.
        self._lock = Lock()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def max_positions(self) -> int:
        """Number of positions of the text decoder."""
        return int(text_config(self.model.config).max_position_embeddings)

    def prompt_length(self, prompt: EvalPrompt) -> int:
        """Tokens of the prompt; those of pictures by their sizes."""
        _, rendered, processor = self._rendered(prompt)
        return self._length(rendered, processor, [one.size() for one in prompt.pictures])

    def encode(self, prompt: EvalPrompt) -> EncodedPrompt:
        """Render a prompt and decode its pictures."""
        turn, rendered, processor = self._rendered(prompt)
        pictures = tuple(picture.open() for picture in prompt.pictures)
        length = self._length(rendered, processor, [one.size for one in pictures])
        return EncodedPrompt(prompt, length, _Question(turn, rendered, pictures, processor))

    def _rendered(self, prompt: EvalPrompt) -> tuple[PromptTurn, RenderedPrompt, TeacherProcessor]:
        if prompt.pictures and not self.processor.takes_images:
            raise DataError(
                f"row {prompt.index} has a picture, but {self.identity.name} reads text only",
                "evaluate it with --with lm-eval",
            )
        turn = question_turn(prompt.text, len(prompt.pictures))
        with self._lock:
            return turn, self.processor.question(turn), self._limited_processor(prompt)

    def _length(
        self,
        rendered: RenderedPrompt,
        processor: TeacherProcessor,
        sizes: Sequence[tuple[int, int]],
    ) -> int:
        with self._lock:
            return processor.length(rendered, sizes)

    def _limited_processor(self, prompt: EvalPrompt) -> TeacherProcessor:
        if prompt.max_tiles is None or not self.identity.uses_max_tiles:
            return self.processor
        if prompt.max_tiles not in self._limited:
            limited = with_max_tiles(self.processor.processor, prompt.max_tiles)
            self._limited[prompt.max_tiles] = TeacherProcessor(limited)
        return self._limited[prompt.max_tiles]

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        """Greedy answers without special tokens and outer spaces."""
        return self._in_groups(batch, lambda part: self._generate(part, max_new_tokens))

    @torch.no_grad()
    def _generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        inputs = self._inputs(batch)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        return [self._text(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        text: str = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip()

    def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        """Sum of log p over each choice's tokens, in nats, without the end-of-turn token.

        The choices of a prompt share its prefill; all of them form one batch.
        """
        return self._in_groups(batch, self._score_choices)

    @torch.no_grad()
    def _score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        tails = [
            ChoiceTail(row, self._choice_ids(encoded.value, choice))
            for row, encoded in enumerate(batch)
            for choice in encoded.prompt.choices
        ]
        inputs = self._inputs(batch)
        # `generate` gives each family its positions and mask of pictures.
        prefill = self.model.generate(
            **inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        )
        mask, cache = inputs["attention_mask"], getattr(prefill, CACHE_NAME)
        return choice_scores(
            prefill.logits[0], tails, lambda longer: self._score_rest(longer, mask, cache)
        )

    def _score_rest(self, tails: Sequence[ChoiceTail], mask: Tensor, cache: Any) -> list[float]:
        """Log p of each answer after its first token; `mask` (B, T) is of the cached prompts."""
        rows = torch.tensor([tail.row for tail in tails], device=self.device)
        cache.reorder_cache(rows)
        ids, new = padded_tails(tails, self.tokenizer.pad_token_id)
        every = torch.cat((mask[rows], new.to(mask)), dim=1)
        positions = (every.long().cumsum(-1) - 1)[:, -ids.shape[1] :]
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=every,
            position_ids=self._multimodal(positions, rows),
            use_cache=True,
            **{CACHE_NAME: cache},
        ).logits
        return later_token_scores(logits, tails)

    def _multimodal(self, positions: Tensor, rows: Tensor) -> Tensor:
        """The positions of text behind pictures, (3, N, W) where the family has multimodal RoPE."""
        deltas = getattr(self.model.base_model, "rope_deltas", None)
        if deltas is None:
            return positions
        return (positions + deltas.to(rows.device)[rows]).expand(3, -1, -1)

    def _choice_ids(self, question: _Question, choice: str) -> list[int]:
        with self._lock:
            return self.processor.answer_tokens(question.turn, question.rendered, choice)

    def _in_groups(
        self,
        batch: Sequence[EncodedPrompt],
        work: Callable[[Sequence[EncodedPrompt]], list[T]],
    ) -> list[T]:
        """`work` on the rows that can be one batch, in the order of `batch`.

        A processor has one limit of tiles. If memory runs out, raise `OutOfMemory`.
        """
        groups: dict[int | None, list[int]] = {}
        for place, encoded in enumerate(batch):
            pictures = encoded.value.pictures
            key = id(encoded.value.processor) if pictures else None
            groups.setdefault(key, []).append(place)
        found: dict[int, T] = {}
        for places in groups.values():
            part = [batch[place] for place in places]
            found.update(zip(places, self._answered(work, part), strict=True))
        return [found[place] for place in range(len(batch))]

    def _answered(
        self, work: Callable[[Sequence[EncodedPrompt]], list[T]], batch: Sequence[EncodedPrompt]
    ) -> list[T]:
        try:
            return translate_out_of_memory(lambda: work(batch))
        except OutOfMemory:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def _inputs(self, batch: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """The model's inputs for rows padded on the left, on its device."""
        questions = [encoded.value for encoded in batch]
        with self._lock:
            inputs = questions[0].processor.inputs(
                [one.rendered.text for one in questions],
                [one.pictures for one in questions],
                padding_side="left",
            )
        return place_inputs(inputs, self.device, self.model.dtype)

    def max_batch_tokens(self, longest: EncodedPrompt, max_new_tokens: int) -> int | None:
        """Padded tokens that fit, from the peak memory of the longest prompt; None without CUDA."""
        return measure_batch_tokens(self, longest, max_new_tokens, self.device)


def load_in_place_eval_model(
    found: ResolvedModel, device: str | None = None, dtype: str = "auto"
) -> InPlaceAdapter:
    """Verify and load a transformers model for evaluation; see `load_eval_model`.

    Raises:
        RunError: its run recorded other tensors.
        CheckpointError: no processor, no chat template, or damaged tensors.
    """
    found.verify()
    opened = found.opened
    assert isinstance(opened, InPlaceCheckpoint)
    processor = open_question_processor(opened)
    place, load_dtype = pick_placement(device, dtype)
    identity = identify(
        found,
        config=opened.raw_config,
        processor={
            "processor": processor_digest(processor.processor),
            "generation": file_digest(opened.folder / GENERATION_CONFIG).hex(),
        },
        device=place,
        dtype=load_dtype,
        uses_max_tiles=takes_max_tiles(processor.processor),
    )
    model = load_in_place_model(opened, device=place, dtype=load_dtype, frozen=True)
    return InPlaceAdapter(model, processor, identity)


def open_question_processor(checkpoint: InPlaceCheckpoint) -> TeacherProcessor:
    """The processor of a folder, with a chat template. Raises `CheckpointError`."""
    processor = load_in_place_processor(checkpoint)
    if processor is None:
        raise CheckpointError(
            f"{checkpoint.path} has no processor, so it cannot be asked anything",
            "put the processor's and the tokenizer's files of its teacher beside it",
        )
    found = TeacherProcessor(processor)
    if found.find_chat_template() is None:
        raise CheckpointError(
            f"{checkpoint.path} has no chat template, so a question has no format",
            "put the chat_template.jinja of its teacher beside it",
        )
    return found
