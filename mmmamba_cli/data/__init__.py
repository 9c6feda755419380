"""Training data: conversations with images, in batches that depend only on seed and step."""

from mmmamba_cli.data.bad_share import check_bad_share
from mmmamba_cli.data.batch import IGNORE_INDEX, BadSample, Batch, StepBatches
from mmmamba_cli.data.batch_text import RowText, TextRun, rows_as_text
from mmmamba_cli.data.corpus import Corpus, CorpusPart
from mmmamba_cli.data.corpus_options import (
    CorpusOption,
    CountOption,
    FlagOption,
    NumberOption,
    RangeOption,
    TextOption,
    read_options,
)
from mmmamba_cli.data.data_report import MAX_NAMED, DataReport, check_data, samples_to_check
from mmmamba_cli.data.fingerprint import Fingerprint, fingerprint
from mmmamba_cli.data.generated_corpus import HELD_OUT, CorpusSpec, GeneratedCorpus, SampleGenerator
from mmmamba_cli.data.holistic_collator import Accumulation, ColumnLimit
from mmmamba_cli.data.index_builder import build_index
from mmmamba_cli.data.index_files import (
    FoundIndex,
    find_index,
    index_file,
    index_key,
    index_summary,
    open_index,
)
from mmmamba_cli.data.loader import StepLoader, can_be_packed
from mmmamba_cli.data.model_batch import ModelBatch
from mmmamba_cli.data.sample import Drawing, Sample, parse_sample
from mmmamba_cli.data.sample_encoder import EncodedSample, SampleEncoder
from mmmamba_cli.data.sample_index import IndexKey, IndexSummary, SampleIndex, read_index
from mmmamba_cli.data.sample_size import SampleSize
from mmmamba_cli.data.sources import open_corpus

__all__ = [
    "HELD_OUT",
    "IGNORE_INDEX",
    "MAX_NAMED",
    "Accumulation",
    "BadSample",
    "Batch",
    "ColumnLimit",
    "Corpus",
    "CorpusOption",
    "CorpusPart",
    "CorpusSpec",
    "CountOption",
    "DataReport",
    "Drawing",
    "EncodedSample",
    "Fingerprint",
    "FlagOption",
    "FoundIndex",
    "GeneratedCorpus",
    "IndexKey",
    "IndexSummary",
    "ModelBatch",
    "NumberOption",
    "RangeOption",
    "RowText",
    "Sample",
    "SampleEncoder",
    "SampleGenerator",
    "SampleIndex",
    "SampleSize",
    "StepBatches",
    "StepLoader",
    "TextOption",
    "TextRun",
    "build_index",
    "can_be_packed",
    "check_bad_share",
    "check_data",
    "find_index",
    "fingerprint",
    "index_file",
    "index_key",
    "index_summary",
    "open_corpus",
    "open_index",
    "parse_sample",
    "read_index",
    "read_options",
    "rows_as_text",
    "samples_to_check",
]
