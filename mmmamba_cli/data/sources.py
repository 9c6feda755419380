"""The source of training data that a text names: files, or a generated corpus."""

from __future__ import annotations

from pathlib import Path

from mmmamba_cli.data.dataset import Corpus, open_files
from mmmamba_cli.data.generated_corpus import open_generated, parse_spec
from mmmamba_cli.data.sample_index import SampleIndex


def open_corpus(
    source: str | Path,
    image_root: Path | None = None,
    *,
    seed: int = 0,
    stream: str = "train",
    index: SampleIndex | None = None,
) -> Corpus:
    """Open conversations in files (`open_files`), or a corpus of a package: `scenes:lessons`.

    `seed` and `stream` select the samples of a generated corpus; files ignore them. The stream
    `HELD_OUT` is finite and shares no sample with another one. With the `index` of a JSON file, its
    samples are not searched: the index has their positions.

    Raises:
        DataError: a file is missing, of an unknown kind, or has no sample; or there is no such
            corpus, or it has no such option.
    """
    spec = parse_spec(str(source))
    if spec is not None:
        return open_generated(spec, seed, stream)
    return open_files(source, image_root, None if index is None else index.positions)
