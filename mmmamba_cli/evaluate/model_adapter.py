"""Evaluation adapter of HolisticVLM: generation and choice likelihoods in left-padded batches.

Legend: B rows of a batch, T columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from mmmamba_cli.checkpoint import InPlaceCheckpoint
from mmmamba_cli.devices import OutOfMemory, translate_out_of_memory
from mmmamba_cli.errors import DataError
from mmmamba_cli.evaluate.batch_memory import measure_batch_tokens
from mmmamba_cli.evaluate.choice_scores import (
    ChoiceTail,
    choice_scores,
    later_token_scores,
    padded_tails,
)
from mmmamba_cli.evaluate.fingerprint import file_digest
from mmmamba_cli.evaluate.in_place_adapter import (
    GENERATION_CONFIG,
    InPlaceAdapter,
    load_in_place_eval_model,
)
from mmmamba_cli.evaluate.interfaces import EncodedPrompt, EvalPrompt, ModelIdentity
from mmmamba_cli.evaluate.model_identity import identify
from mmmamba_cli.inference import Generator, make_generator
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.cache import CACHE_NAME
from mmmamba_cli.processing import (
    HolisticTextProcessor,
    HolisticVLMProcessor,
    content_with_images,
    count_tiles,
    processor_digest,
)
from mmmamba_cli.runs import ResolvedModel, pick_placement

T = TypeVar("T")


@dataclass(frozen=True)
class _Inputs:
    """The ids of a prompt, and its tiles (N, 3, S, S) or None."""

    ids: list[int]
    pixels: Tensor | None
    num_tiles: tuple[int, ...]


class HolisticVLMAdapter:
    """A loaded model and its processor as an `EvalModel`."""

    def __init__(
        self,
        model: HolisticVLM,
        processor: HolisticVLMProcessor | HolisticTextProcessor,
        identity: ModelIdentity,
    ):
        self.model = model
        self.processor = processor
        self.identity = identity
        # Suites need greedy decoding: ignore the checkpoint's sampling settings and penalties.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=self._stop_ids,
            pad_token_id=processor.pad_token_id,
            suppress_tokens=model.generation_config.suppress_tokens,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def max_positions(self) -> int:
        """Number of positions of the language stack."""
        return int(self.model.config.language.max_position_embeddings)

    def prompt_length(self, prompt: EvalPrompt) -> int:
        """Tokens of the prompt without the constant ones of the chat template."""
        text = len(self.processor.text_ids(prompt.text))
        if not prompt.pictures:
            return text
        processor = self._vision_processor(prompt)
        tiling = processor.image_processor.with_tile_limits(None, prompt.max_tiles).tiling
        tiles = sum(count_tiles(*picture.size(), tiling) for picture in prompt.pictures)
        return text + tiles * processor.tokens_per_tile

    def encode(self, prompt: EvalPrompt) -> EncodedPrompt:
        """Tokenize a prompt and cut its pictures into tiles in the model's dtype."""
        if prompt.pictures:
            batch = self._vision_processor(prompt).chat(
                [_question(prompt)],
                [picture.open() for picture in prompt.pictures],
                padding=False,
                return_tensors=None,
                max_tiles=prompt.max_tiles,
                return_num_tiles=True,
            )
        else:
            batch = self.processor.chat([_question(prompt)], padding=False, return_tensors=None)
        ids = list(batch["input_ids"][0])
        pixels = batch.get("pixel_values")
        if pixels is not None:
            pixels = pixels.to(self.model.dtype)
        return EncodedPrompt(
            prompt, len(ids), _Inputs(ids, pixels, tuple(batch.get("num_tiles", ())))
        )

    def _vision_processor(self, prompt: EvalPrompt) -> HolisticVLMProcessor:
        if isinstance(self.processor, HolisticTextProcessor):
            raise DataError(
                f"row {prompt.index} has a picture, but {self.identity.name} reads text only",
                "evaluate it with --with lm-eval",
            )
        return self.processor

    def generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        """Greedy answers without special tokens and outer spaces."""
        return self._release_if_out_of_memory(lambda: self._generate(batch, max_new_tokens))

    @torch.no_grad()
    def _generate(self, batch: Sequence[EncodedPrompt], max_new_tokens: int) -> list[str]:
        inputs = self._inputs([encoded.value.ids for encoded in batch], batch)
        if self.generator is None:
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        else:
            tokens = self.generator.generate(
                **inputs, max_new_tokens=max_new_tokens, eos=self._stop_ids
            )
        return [self._text(row) for row in tokens.tolist()]

    @cached_property
    def generator(self) -> Generator | None:
        """The fast decoder; None for a model that cannot be packed: transformers decodes it."""
        return make_generator(self.model)

    def _release_if_out_of_memory(self, work: Callable[[], T]) -> T:
        """Return `work()`. If memory runs out, free caches and graphs and raise `OutOfMemory`."""
        try:
            return translate_out_of_memory(work)
        except OutOfMemory:
            # Only a generator that exists: making one takes memory.
            generator = vars(self).get("generator")
            if generator is not None:
                generator.release()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    @property
    def _stop_ids(self) -> list[int]:
        return sorted(set(self.processor.stop_token_ids))

    def _text(self, ids: list[int]) -> str:
        stops = set(self._stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text: str = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip()

    def score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        """Sum of log p over each choice's tokens, in nats, without the end-of-turn token.

        The choices of a prompt share its prefill; all of them form one batch.
        """
        return self._release_if_out_of_memory(lambda: self._score_choices(batch))

    @torch.no_grad()
    def _score_choices(self, batch: Sequence[EncodedPrompt]) -> list[list[float]]:
        answers = [
            [self._answered_ids(encoded, choice) for choice in encoded.prompt.choices]
            for encoded in batch
        ]
        # An answer is tokenized apart from the text before it, so that all choices share this.
        prefixes = [ids[:start] for (ids, start), *_ in answers]
        tails = [
            ChoiceTail(row, ids[start:])
            for row, of_prompt in enumerate(answers)
            for ids, start in of_prompt
        ]
        inputs = self._inputs(prefixes, batch)
        outputs = self.model(**inputs, use_cache=True, logits_to_keep=1)
        mask, cache = inputs["attention_mask"], getattr(outputs, CACHE_NAME)
        return choice_scores(
            outputs.logits[:, -1], tails, lambda longer: self._score_rest(longer, mask, cache)
        )

    def _score_rest(self, tails: Sequence[ChoiceTail], mask: Tensor, cache: Cache) -> list[float]:
        """Log p of each answer after its first token; `mask` (B, T) is of the cached prompts."""
        rows = torch.tensor([tail.row for tail in tails], device=self.device)
        cache.reorder_cache(rows)
        ids, new = padded_tails(tails, self.processor.pad_token_id)
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=torch.cat((mask[rows], new.to(mask)), dim=1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return later_token_scores(logits, tails)

    def _answered_ids(self, encoded: EncodedPrompt, choice: str) -> tuple[list[int], int]:
        """Ids of the prompt answered with `choice`, and the first column of the answer."""
        talk = [_question(encoded.prompt), {"role": "assistant", "content": choice}]
        ids, is_answer = self.processor.conversation_ids(talk, encoded.value.num_tiles)
        columns = [i for i, answers in enumerate(is_answer) if answers]
        stops = set(self._stop_ids)
        end = next((i for i in columns if ids[i] in stops), len(ids))
        return ids[:end], columns[0]

    def _inputs(self, ids: Sequence[list[int]], encoded: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """The model inputs of a left-padded batch, on the model's device."""
        width = max(map(len, ids))
        pad = self.processor.pad_token_id
        rows = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        inputs = {"input_ids": rows.to(self.device), "attention_mask": mask.to(self.device)}
        pixels = [one.value.pixels for one in encoded if one.value.pixels is not None]
        if pixels:
            inputs["pixel_values"] = torch.cat([one.to(self.device) for one in pixels])
        return inputs

    def max_batch_tokens(self, longest: EncodedPrompt, max_new_tokens: int) -> int | None:
        """Padded tokens that fit, from the peak memory of the longest prompt; None without CUDA."""
        if self.device.type == "cuda" and not longest.prompt.choices:
            # Pack the weights before memory is measured.
            translate_out_of_memory(lambda: self.generator)
        return measure_batch_tokens(self, longest, max_new_tokens, self.device)


TransformersModel = HolisticVLMAdapter | InPlaceAdapter


def load_eval_model(
    found: ResolvedModel, device: str | None = None, dtype: str = "auto"
) -> TransformersModel:
    """Verify and load a model for evaluation; its tensors are hashed if their hash is not known.

    `device` None is CUDA where there is one; dtype "auto" is bf16 there, and fp32 on a CPU. Raises
    `RunError` if its run recorded other tensors, `CheckpointError` if it has no tokenizer.
    """
    if isinstance(found.opened, InPlaceCheckpoint):
        return load_in_place_eval_model(found, device, dtype)
    found.verify()
    processor = found.require_processor(
        "asked anything",
        "put the teacher's tokenizer.model there, or seed again with --tokenizer FILE",
    )
    target, load_dtype = pick_placement(device, dtype)
    identity = identify(
        found,
        config=found.checkpoint.config.to_dict(),
        processor={
            "processor": processor_digest(processor),
            # Has tokens that are not generated.
            "generation": file_digest(found.checkpoint.folder / GENERATION_CONFIG).hex(),
        },
        device=target,
        dtype=load_dtype,
    )
    return HolisticVLMAdapter(found.load(target, load_dtype), processor, identity)


def _question(prompt: EvalPrompt) -> dict[str, Any]:
    """The user's message; only the placeholders of its pictures are not text."""
    content = content_with_images(prompt.text, len(prompt.pictures))
    return {"role": "user", "content": content}
