"""Training data: conversations with images, in batches that depend on seed and step alone."""

from mmmamba_cli.data.batch import IGNORED, BadSample, Batch, StepBatches
from mmmamba_cli.data.dataset import Corpus, Part, open_corpus
from mmmamba_cli.data.fingerprint import Fingerprint, fingerprint
from mmmamba_cli.data.loader import StepLoader
from mmmamba_cli.data.sample import Sample
from mmmamba_cli.data.tokenize import Encoded, Encoder
from mmmamba_cli.data.validate import NAMED, DataReport, check_data

__all__ = [
    "IGNORED",
    "NAMED",
    "BadSample",
    "Batch",
    "Corpus",
    "DataReport",
    "Encoded",
    "Encoder",
    "Fingerprint",
    "Part",
    "Sample",
    "StepBatches",
    "StepLoader",
    "check_data",
    "fingerprint",
    "open_corpus",
]
