"""Validation of a dataset before training: lengths, images and problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from mmmamba_cli.data.batch import BadSample, bad_sample
from mmmamba_cli.data.collator import make_collator
from mmmamba_cli.data.corpus import Corpus
from mmmamba_cli.data.generated_corpus import GeneratedCorpus
from mmmamba_cli.data.sample import Drawing, Sample
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import TeacherProcessor, TrainingProcessor

# Bad samples that a report lists by name.
MAX_NAMED = 10
# Samples that are read of a corpus without an end.
ENDLESS_SAMPLES = 1000


@dataclass
class DataReport:
    """Counts of usable samples, and the problems of the others."""

    samples: int = 0
    with_images: int = 0
    images: int = 0
    tiles: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    # Samples truncated to the maximum length.
    cut: int = 0
    # Samples with an answer that has no words, and those of which no token is learned: their
    # answers lie beyond the maximum length.
    empty_answers: int = 0
    without_answer: int = 0
    # In tokens before truncation; `tokens` and `answer_tokens` count after it.
    lengths: list[int] = field(default_factory=list, repr=False)
    bad: list[BadSample] = field(default_factory=list, repr=False)
    # Names of members that belong to no sample, with the reason.
    ignored: list[str] = field(default_factory=list, repr=False)

    @property
    def bad_share(self) -> float:
        return len(self.bad) / max(1, self.samples)

    @property
    def cut_share(self) -> float:
        return self.cut / max(1, self.samples)

    def length_at(self, percent: int) -> int | None:
        """The percentile of lengths; None without samples."""
        if len(self.lengths) < 2:
            return self.lengths[0] if self.lengths else None
        return round(quantiles(self.lengths, n=100, method="inclusive")[percent - 1])

    def reasons(self) -> dict[str, int]:
        """Number of samples by kind of problem, most common first."""
        return dict(Counter(_kind(sample.reason) for sample in self.bad).most_common())

    def as_dict(self, named: int | None = MAX_NAMED) -> dict[str, Any]:
        """The report as JSON; `named` limits the lists of bad samples and ignored members."""
        return {
            "samples": self.samples,
            "with_images": self.with_images,
            "images": self.images,
            "tiles": self.tiles,
            "tokens": self.tokens,
            "answer_tokens": self.answer_tokens,
            "cut": self.cut,
            "cut_share": self.cut_share,
            "empty_answers": self.empty_answers,
            "without_answer": self.without_answer,
            "length": {
                "min": min(self.lengths, default=None),
                "median": self.length_at(50),
                "p95": self.length_at(95),
                "max": max(self.lengths, default=None),
            },
            "bad": len(self.bad),
            "bad_share": self.bad_share,
            "reasons": self.reasons(),
            "named": [vars(sample) for sample in self.bad[:named]],
            "unnamed": len(self.bad[named:]) if named is not None else 0,
            "ignored": len(self.ignored),
            "ignored_names": self.ignored[:named],
        }


def samples_to_check(corpus: Corpus) -> int:
    """Samples that a check without a limit reads: all, or 1,000 of an endless corpus."""
    endless = isinstance(corpus, GeneratedCorpus) and corpus.endless
    return ENDLESS_SAMPLES if endless else len(corpus)


def check_data(
    corpus: Corpus,
    processor: TrainingProcessor | TeacherProcessor,
    max_length: int,
    max_tiles: int | None = None,
    *,
    limit: int | None = None,
    decode: bool = True,
    advance: Callable[[int], None] | None = None,
) -> DataReport:
    """Read every sample, or the first `limit`, as training would; decode pictures if `decode`.

    The arguments are those of `StepLoader`.

    If all samples are read, pictures that no sample uses are reported among `ignored`.
    """
    collator = make_collator(corpus, processor, max_length, max_tiles)
    report = DataReport(ignored=list(corpus.ignored))
    unused = {picture: name for name, picture in corpus.pictures.items()}
    count = min(len(corpus), limit or samples_to_check(corpus))
    for index in range(count):
        report.samples += 1
        try:
            sample = corpus[index]
            for picture in sample.images:
                if not isinstance(picture, Drawing):
                    unused.pop(picture, None)
            encoded = collator.encode(sample)
            if decode:
                collator.decode(encoded)
        except DataError as error:
            report.bad.append(bad_sample(error, corpus.name(index)))
        else:
            report.with_images += bool(encoded.images)
            report.images += len(encoded.images)
            report.tiles += sum(encoded.num_tiles)
            report.tokens += len(encoded)
            report.answer_tokens += encoded.num_answer_tokens
            report.cut += encoded.cut > 0
            report.empty_answers += _has_empty_answer(sample)
            report.without_answer += encoded.num_answer_tokens == 0
            report.lengths.append(len(encoded) + encoded.cut)
        if advance is not None:
            advance(1)
    if count == len(corpus):
        report.ignored += [f"{name}: a picture that no sample shows" for name in unused.values()]
    return report


def _has_empty_answer(sample: Sample) -> bool:
    """Whether an answer has no words: its label is the end of the turn alone."""
    contents = (turn["content"] for turn in sample.messages if turn["role"] == "assistant")
    texts = (
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for content in contents
    )
    return any(not text.strip() for text in texts)


def _kind(reason: str) -> str:
    """A reason with paths and numbers, which differ by sample, replaced by `...`."""
    words = [
        "..." if "/" in word or any(map(str.isdigit, word)) else word for word in reason.split()
    ]
    return " ".join(words)[:80]
