"""Checks of the libraries that determine the inputs of a model: SentencePiece and Pillow."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from tempfile import TemporaryDirectory

from mmmamba_cli.doctor.report import FAILED, OK, WARNING, Check

# Hard cases for tokenizers: spaces, CJK, accents, a character that needs byte fallback.
SAMPLES = ("The quick brown fox, 42 dogs.", "  two  spaces", "你好，世界", "naïve café", "🙂 ok")
CORPUS = ("the quick brown fox jumps over the lazy dog", "one two three four", "你好，世界")
VOCABULARY_SIZE = 350
# SHA-256 of a gradient resized by Pillow's bicubic filter. The filter is integer arithmetic, so the
# bytes are equal on every machine; observed with Pillow 10.4, 11.3, 12.0 and 13.0 on x86-64.
RESIZED_DIGEST = "3a4b38ddd5991809"
RESIZED_SIDE = 448


def check_tokenizer() -> Check:
    """Train a small SentencePiece model; check its round trip, and our tokenizer against it."""
    try:
        import sentencepiece
    except ImportError as error:
        return Check("sentencepiece", FAILED, f"cannot be imported: {error}", "reinstall it")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=VOCABULARY_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    difference = _round_trip_difference(model.getvalue())
    if difference is not None:
        return Check("sentencepiece", FAILED, difference, "reinstall sentencepiece and protobuf")
    return Check("sentencepiece", OK, f"{len(SAMPLES)} texts come back as they were")


def _round_trip_difference(model: bytes) -> str | None:
    """How the first text changes in SentencePiece or in our tokenizer; None if none does."""
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
    """Resize a picture and compare its digest with the expected one."""
    try:
        first, second = _resized_digest(), _resized_digest()
    except ImportError as error:
        return Check("pillow", FAILED, f"cannot be imported: {error}", "reinstall it")
    if first != second:
        return Check("pillow", FAILED, "resizes a picture differently each time", "reinstall it")
    if first != RESIZED_DIGEST:
        return Check(
            "pillow",
            WARNING,
            "resizes to other pixels than those the project was tested with",
            "use the Pillow of PyPI; forks such as Pillow-SIMD differ",
        )
    return Check("pillow", OK, "resizes to the pixels that are expected")


def _resized_digest() -> str:
    from PIL import Image

    red = Image.linear_gradient("L").resize((637, 411), Image.Resampling.NEAREST)
    green = Image.radial_gradient("L").resize((637, 411), Image.Resampling.NEAREST)
    picture = Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    return hashlib.sha256(
        picture.resize((RESIZED_SIDE, RESIZED_SIDE), Image.Resampling.BICUBIC).tobytes()
    ).hexdigest()[:16]
