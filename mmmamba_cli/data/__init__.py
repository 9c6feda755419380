"""Training data: conversations with images, in batches that depend only on seed and step."""

from mmmamba_cli.data.batch import IGNORE_INDEX, BadSample, Batch, StepBatches
from mmmamba_cli.data.dataset import Corpus, CorpusPart, open_corpus
from mmmamba_cli.data.fingerprint import Fingerprint, fingerprint
from mmmamba_cli.data.loader import StepLoader
from mmmamba_cli.data.sample import Sample
from mmmamba_cli.data.tokenize import EncodedSample, SampleEncoder
from mmmamba_cli.data.validate import MAX_NAMED, DataReport, check_data

__all__ = [
    "IGNORE_INDEX",
    "MAX_NAMED",
    "BadSample",
    "Batch",
    "Corpus",
    "CorpusPart",
    "DataReport",
    "EncodedSample",
    "Fingerprint",
    "Sample",
    "SampleEncoder",
    "StepBatches",
    "StepLoader",
    "check_data",
    "fingerprint",
    "open_corpus",
]
