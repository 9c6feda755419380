"""How long a student remembers, what errors do over its length: decays, certificates, precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmmamba_cli.lazy_imports import lazy_attributes
from mmmamba_cli.stability.findings import (
    LONG_MEMORY,
    SHORT_MEMORY,
    find_sentences,
    format_tokens,
    half_life,
    share_of,
)
from mmmamba_cli.stability.stability_record import (
    STABILITY,
    STABILITY_FILE,
    DeviationRecord,
    HeadDecay,
    LayerStability,
    PrecisionRecord,
    StabilityRecord,
    read_stability,
)

if TYPE_CHECKING:
    from mmmamba_cli.stability.measurement import (
        StabilityOptions,
        count_passes,
        measure_stability,
    )
    from mmmamba_cli.stability.texts import (
        TokenizerEncoder,
        conversation_text,
        encode_text,
        read_text,
        sample_text,
    )

__all__ = [
    "LONG_MEMORY",
    "SHORT_MEMORY",
    "STABILITY",
    "STABILITY_FILE",
    "DeviationRecord",
    "HeadDecay",
    "LayerStability",
    "PrecisionRecord",
    "StabilityOptions",
    "StabilityRecord",
    "TokenizerEncoder",
    "conversation_text",
    "count_passes",
    "encode_text",
    "find_sentences",
    "format_tokens",
    "half_life",
    "measure_stability",
    "read_stability",
    "read_text",
    "sample_text",
    "share_of",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "measurement": ("StabilityOptions", "count_passes", "measure_stability"),
        "texts": (
            "TokenizerEncoder",
            "conversation_text",
            "encode_text",
            "read_text",
            "sample_text",
        ),
    },
)
