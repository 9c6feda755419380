"""The interface of a measurement of layers."""

from __future__ import annotations

from typing import Protocol

from mmmamba_cli.layer_selection.probe_samples import SampleSums


class LayerMethod(Protocol):
    """Measures what the teacher's attention is worth in each layer of a student.

    Layers are measured in ascending order; a resumed measurement begins at any of them.
    """

    def measure(self, layer: int) -> SampleSums:
        """The worth of `layer` on each sample; the larger, the more it needs attention."""
        ...
