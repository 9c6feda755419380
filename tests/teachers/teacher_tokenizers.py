"""Small BPE tokenizers, trained on a few sentences, with the special tokens of each family."""

from __future__ import annotations

import json
from functools import cache

import teacher_templates as templates
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Other Chinese characters than these fall back to bytes.
CORPUS = [
    "What is in the picture? The picture shows a small red square on a white ground.",
    "Compare the pictures and describe the differences between them in one sentence.",
    "How many colours does the video show, and in which order do they appear?",
    "The answer is four. The first is larger than the second, the third is green.",
    "请描述这张图片。图片里有一个红色的正方形。",
    "Read the text aloud, count the words, and name the language of every line.",
]

CHATML_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_VL_SPECIAL_TOKENS = [
    *CHATML_SPECIAL_TOKENS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
INTERNVL_SPECIAL_TOKENS = [*CHATML_SPECIAL_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
LLAVA_ONEVISION_SPECIAL_TOKENS = [*CHATML_SPECIAL_TOKENS, "<image>", "<video>"]
SMOLVLM_SPECIAL_TOKENS = [
    *CHATML_SPECIAL_TOKENS,
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
]
MISTRAL_SPECIAL_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
]
GEMMA_SPECIAL_TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]
LLAMA_SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]


@cache
def byte_level_bpe(special_tokens: tuple[str, ...]) -> str:
    """A byte-level BPE tokenizer as JSON, as in GPT-2, Qwen, Llama 3 and Mistral's Tekken."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special_tokens) + 320,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def byte_fallback_bpe(special_tokens: tuple[str, ...]) -> str:
    """A BPE tokenizer over characters as JSON; unknown ones become bytes, as in Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special_tokens) + 256 + 150,
        special_tokens=[*special_tokens, *byte_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # A special token is cut out of a text before BPE, so bytes are ordinary tokens.
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if token["content"] not in byte_tokens
    ]
    return json.dumps(described)


def make_tokenizer(
    described: str,
    chat_template: str,
    *,
    pad: str,
    eos: str,
    bos: str | None = None,
    named: dict[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer that pads on the left.

    Args:
        described: a tokenizer of the `tokenizers` library, as JSON.
        chat_template: the template in Jinja.
        pad: the padding token.
        eos: the token that ends an answer.
        bos: the token before a text, where the family has one; the template writes it.
        named: special tokens that the family's processor reads as attributes of the tokenizer.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(described),
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=named or {},
        padding_side="left",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def chatml_tokenizer(
    special_tokens: list[str], chat_template: str, named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        byte_level_bpe(tuple(special_tokens)),
        chat_template,
        pad="<|endoftext|>",
        eos="<|im_end|>",
        named=named,
    )


def internvl_tokenizer() -> PreTrainedTokenizerFast:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return chatml_tokenizer(INTERNVL_SPECIAL_TOKENS, templates.INTERNVL, named)


def smolvlm_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(
        byte_level_bpe(tuple(SMOLVLM_SPECIAL_TOKENS)),
        templates.SMOLVLM,
        pad="<|im_end|>",
        eos="<end_of_utterance>",
        bos="<|im_start|>",
    )


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    described = byte_level_bpe(tuple(MISTRAL_SPECIAL_TOKENS))
    return make_tokenizer(described, templates.MISTRAL, pad="<pad>", eos="</s>", bos="<s>")


def gemma3_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(
        byte_fallback_bpe(tuple(GEMMA_SPECIAL_TOKENS)),
        templates.GEMMA3,
        pad="<pad>",
        eos="<end_of_turn>",
        bos="<bos>",
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )


def llama_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(
        byte_level_bpe(tuple(LLAMA_SPECIAL_TOKENS)),
        templates.LLAMA3,
        pad="<|finetune_right_pad_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    )


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family of `families.FAMILIES`."""
    if family in ("qwen2_5_vl", "qwen3_vl"):
        return chatml_tokenizer(QWEN_VL_SPECIAL_TOKENS, templates.QWEN_VL)
    if family in ("qwen2", "qwen3"):
        return chatml_tokenizer(CHATML_SPECIAL_TOKENS, templates.CHATML_TEXT)
    if family == "llava_onevision":
        return chatml_tokenizer(LLAVA_ONEVISION_SPECIAL_TOKENS, templates.LLAVA_ONEVISION)
    makers = {
        "internvl": internvl_tokenizer,
        "smolvlm": smolvlm_tokenizer,
        "idefics3": smolvlm_tokenizer,
        "mistral3": mistral_tokenizer,
        "ministral3": mistral_tokenizer,
        "gemma3": gemma3_tokenizer,
        "llama": llama_tokenizer,
    }
    return makers[family]()
