"""Libraries whose results decide what a model reads: the tokenizer's, and the one for pictures."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from tempfile import TemporaryDirectory

from mmmamba_cli.doctor.report import FAILED, OK, WARNING, Check

# Sentences with what tokenizers stumble over: spaces, other scripts, a byte-fallback character.
SAMPLES = ("The quick brown fox, 42 dogs.", "  two  spaces", "你好，世界", "naïve café", "🙂 ok")
CORPUS = ("the quick brown fox jumps over the lazy dog", "one two three four", "你好，世界")
VOCABULARY = 350
# A gradient resized by Pillow's bicubic filter, which is integer arithmetic: the same bytes on
# every machine; seen with Pillow 10.4, 11.3, 12.0 and 13.0 on x86-64.
RESIZED = "3a4b38ddd5991809"
SIDE = 448


def check_tokenizer() -> Check:
    """A SentencePiece model trained here reads what it wrote, and our tokenizer gives its ids."""
    try:
        import sentencepiece
    except ImportError as error:
        return Check("sentencepiece", FAILED, f"cannot be imported: {error}", "reinstall it")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    said = _disagreement(model.getvalue())
    if said is not None:
        return Check("sentencepiece", FAILED, said, "reinstall sentencepiece and protobuf")
    return Check("sentencepiece", OK, f"{len(SAMPLES)} texts come back as they were")


def _disagreement(model: bytes) -> str | None:
    """The first text that does not survive SentencePiece, or our tokenizer built on it."""
    from sentencepiece import SentencePieceProcessor

    from mmmamba_cli.processing import build_tokenizer

    processor = SentencePieceProcessor(model_proto=model)
    with TemporaryDirectory(prefix="mmmamba-") as folder:
        file = Path(folder, "tokenizer.model")
        file.write_bytes(model)
        tokenizer = build_tokenizer(file, processor.get_piece_size(), required=())
    for text in SAMPLES:
        ids = processor.encode(text)
        if processor.decode(ids) != text:
            return f"{text!r} comes back as {processor.decode(ids)!r}"
        if tokenizer(text, add_special_tokens=False).input_ids != ids:
            return f"{text!r} has other ids in the tokenizer that models use"
        if tokenizer.decode(ids) != text:
            return f"{text!r} comes back as {tokenizer.decode(ids)!r} from our tokenizer"
    return None


def check_resizing() -> Check:
    """Pictures are cut and resized to the same pixels as everywhere."""
    try:
        first, second = _resized(), _resized()
    except ImportError as error:
        return Check("pillow", FAILED, f"cannot be imported: {error}", "reinstall it")
    if first != second:
        return Check("pillow", FAILED, "resizes a picture differently each time", "reinstall it")
    if first != RESIZED:
        return Check(
            "pillow",
            WARNING,
            "resizes to other pixels than those the project was tested with",
            "use the Pillow of PyPI; forks such as Pillow-SIMD differ",
        )
    return Check("pillow", OK, "resizes to the pixels that are expected")


def _resized() -> str:
    from PIL import Image

    red = Image.linear_gradient("L").resize((637, 411), Image.Resampling.NEAREST)
    green = Image.radial_gradient("L").resize((637, 411), Image.Resampling.NEAREST)
    picture = Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    return hashlib.sha256(
        picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()
    ).hexdigest()[:16]
