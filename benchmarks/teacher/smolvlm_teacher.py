"""A small teacher of another family for `train.py`: Idefics3, the class of the first SmolVLM.

A SigLIP tower with 3 layers, pixel shuffle and a linear connector, a Llama with 8 layers: 8 M
parameters. A picture of 224 x 224 pixels is 64 tokens; it is not cropped. All weights begin at
random.

With `--begin` the text layers begin as those of a trained HoVLE teacher, which have the same form,
and the token embeddings as means of its embeddings. The tower and the connector still begin at
random; for `TOWER_STEPS` steps they alone learn, to give the image embeddings of that teacher.

Legend: B rows, T columns, A answer tokens a row, N pictures a row, D hidden size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
import torch
import torch.nn.functional as F
import transformers
from architecture import PATCH, STACK, TILE
from batches import LESSON, TEXT
from learning import Branched
from prompts import TOKENS_PER_TILE, SmolvlmPrompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from vocabulary import PIECES, corpus

import mmmamba_cli
from mmmamba_cli.processing.tiling import IMAGENET_MEAN, IMAGENET_STD
from mmmamba_evals.scenes.world import World

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
)
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{% if message.content is not string and message.content[0].type == 'image' %}:"
    "{% else %}: {% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
LAYERS = 8
TOWER_STEPS = 400
TOWER = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": PATCH,
}
# HoVLE's names of a block's tensors, and Llama's.
BLOCK = {
    "mixer_norm": "input_layernorm",
    "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj",
    "mixer.v_proj": "self_attn.v_proj",
    "mixer.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
# The last matrix of an attention or an MLP.
LAST = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
SMOLVLM = transformers.Idefics3ForConditionalGeneration


class SmolvlmTeacher:
    """Idefics3 with a Llama of 8 layers."""

    kinds: ClassVar = {LESSON: (0.92, 0.92), TEXT: (0.08, 0.08)}
    mean = deviation = (0.5, 0.5, 0.5)

    def prompts(self, folder: Path, world: World, seed: int) -> SmolvlmPrompts:
        """Write the processor to `folder`, unless its tokenizer is there."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            write_processor(folder, train_bpe(corpus(world, seed)))
        return SmolvlmPrompts(file.read_text())

    def model(self, prompts: SmolvlmPrompts, given: argparse.Namespace) -> SMOLVLM:
        config = smolvlm_config(prompts.tokens)
        torch.manual_seed(given.seed)
        model = SMOLVLM._from_config(config, attn_implementation="sdpa").float()
        init_weights(model)
        self._reference = None
        if given.begin is not None:
            copy_text_layers(given.begin, model, prompts.tokens)
            self._reference = mmmamba_cli.load(given.begin, dtype=torch.float32).model.vision
        return model

    def early_loss(self, model: SMOLVLM, step: int, pixels: Tensor | None) -> Tensor | None:
        """The squared error of the image embeddings in the first steps of a run with `--begin`."""
        if self._reference is None or step >= TOWER_STEPS or pixels is None:
            return None
        vision = self._reference.to(pixels.device)
        mean, deviation = (
            torch.tensor(each, device=pixels.device).view(3, 1, 1)
            for each in (IMAGENET_MEAN, IMAGENET_STD)
        )
        with torch.no_grad():
            wanted = vision.merge(vision((0.5 + 0.5 * pixels - mean) / deviation)).flatten(0, -2)
        found = image_embeddings(model, pixels).flatten(0, -2)
        return F.mse_loss(found.float(), wanted.float()) / wanted.float().var()

    def blocks(self, model: SMOLVLM) -> Iterable[torch.nn.Module]:
        return [*model.model.vision_model.encoder.layers, *model.model.text_model.layers]

    def logits(self, model: SMOLVLM, **inputs: Any) -> Tensor:
        return answer_logits(model, **inputs)

    def write(self, folder: Path, model: SMOLVLM) -> None:
        """Write config and weights in bf16."""
        state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder, state_dict=state)


def train_bpe(lines: list[str]) -> Tokenizer:
    """A byte-level BPE of `PIECES` tokens, in which each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {line}" for line in lines], trainer)
    return tokenizer


def write_processor(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer, image processor and chat template."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        padding_side="left",
    )
    edge = {"longest_edge": TILE}
    name = "Idefics3ImageProcessor"
    images = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    processor = transformers.Idefics3Processor(
        image_processor=images(size=edge, max_image_size=edge, do_image_splitting=False),
        tokenizer=fast,
        image_seq_len=TOKENS_PER_TILE,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)


def smolvlm_config(tokens: Tokenizer) -> transformers.Idefics3Config:
    ids = {
        "pad_token_id": tokens.token_to_id("<|im_end|>"),
        "bos_token_id": tokens.token_to_id("<|im_start|>"),
        "eos_token_id": tokens.token_to_id("<end_of_utterance>"),
    }
    text = {
        "model_type": "llama",
        "vocab_size": tokens.get_vocab_size(),
        **STACK,
        "num_hidden_layers": LAYERS,
        "head_dim": STACK["hidden_size"] // STACK["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 32_768,
        **ids,
    }
    return transformers.Idefics3Config(
        text_config=text,
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokens.token_to_id("<image>"),
        tie_word_embeddings=False,
        **ids,
    )


@torch.no_grad()
def init_weights(model: SMOLVLM) -> None:
    """Normal weights with the variance of one over the inputs; block outputs scaled by depth."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif "embed" in name and "patch" not in name:
            parameter.normal_(std=0.04)
        else:
            deep = name.endswith(
                ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
            )
            parameter.normal_(std=parameter[0].numel() ** -0.5 * (0.3 if deep else 1.0))


@torch.no_grad()
def copy_text_layers(folder: Path, model: SMOLVLM, tokens: Tokenizer) -> None:
    """Copy the blocks of a HoVLE teacher; a token gets the mean of its pieces there."""
    state = mmmamba_cli.load(folder, dtype=torch.float32).state_dict()
    text = model.model.text_model
    for index, layer in enumerate(text.layers):
        for ours, theirs in BLOCK.items():
            weight = state[f"model.layers.{index}.{ours}.weight"]
            layer.get_parameter(f"{theirs}.weight").copy_(weight)
    text.norm.weight.copy_(state["model.norm.weight"])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    special = json.loads((folder / "added_tokens.json").read_text())
    same = {
        "<|im_start|>": "<|im_start|>",
        "<|im_end|>": "<|im_end|>",
        "<end_of_utterance>": "<|im_end|>",
        "<fake_token_around_image>": "<img>",
        "<image>": "<IMG_CONTEXT>",
        "<global-img>": "<img>",
    }
    for token in range(tokens.get_vocab_size()):
        name = tokens.id_to_token(token)
        if name in same:
            found = [special[same[name]]]
        else:
            # SentencePiece writes a space before a text by itself.
            written = tokens.decode([token], skip_special_tokens=False)
            found = pieces.encode(written.removeprefix(" ")) or [0]
        text.embed_tokens.weight[token] = state["model.text_embedding.weight"][found].mean(0)
        model.lm_head.weight[token] = state["lm_head.weight"][found].mean(0)


def image_embeddings(model: SMOLVLM, pixels: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 64, D)."""
    whole = torch.ones(len(pixels), TILE // PATCH, TILE // PATCH, device=pixels.device).bool()
    seen = model.model.vision_model(pixels, patch_attention_mask=whole).last_hidden_state
    return model.model.connector(seen)


def answer_logits(
    model: SMOLVLM, ids: Tensor, positions: Tensor, branch: Tensor | None, columns: Tensor,
    pixels: Tensor | None,
) -> Tensor:  # fmt: skip
    """Logits (B, A, V) at `columns`.

    `pixels` (B * N, 3, S, S) is normalised. Attention is plain causal if `branch` is None.
    """
    text = model.model.text_model
    hidden = text.embed_tokens(ids)
    if pixels is not None:
        images = image_embeddings(model, pixels).reshape(len(ids), -1, hidden.shape[-1])
        is_image = ids == model.config.image_token_id
        place = (is_image.long().cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
        hidden = torch.where(is_image.unsqueeze(-1), images[rows, place].to(hidden.dtype), hidden)
    mask = None
    if branch is not None:
        mask = Branched(None, None, 0, branch=branch).attention_mask(ids.shape[1])  # type: ignore[arg-type]
    hidden = text(
        inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return model.lm_head(hidden[rows, columns])
