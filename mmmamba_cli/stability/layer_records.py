"""Decays of the layers of a model as the result of a measurement has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.model.gated_mixer import GATED_NORM_EPS
from mmmamba_cli.stability.decay_spectrum import DecayTotals, certified_exponents, slowest_channel
from mmmamba_cli.stability.model_layers import layer_specs, options_of_layer
from mmmamba_cli.stability.stability_record import HeadDecay, LayerStability

# The norm of a read-out divides by sqrt(mean square + eps): below this multiple of sqrt(eps), it
# magnifies errors more than signals.
LOW_READ_OUT = 10 * GATED_NORM_EPS**0.5


def layer_records(
    model: Any, totals: dict[int, DecayTotals], starts: dict[int, Tensor]
) -> tuple[LayerStability, ...]:
    """A record for each layer of `model`, from its decays over a text.

    `starts` has the exponents of the seeded student by layer, (H, ...) as of
    `certified_exponents`.
    """
    found = []
    for layer, spec in enumerate(layer_specs(model)):
        if layer not in totals:
            how = spec.forgetting(options_of_layer(model, layer))
            found.append(LayerStability(layer=layer, mixer=spec.title, decay=None, forgetting=how))
            continue
        sums = totals[layer]
        read_outs = torch.cat(sums.read_out_rms)
        found.append(
            LayerStability(
                layer=layer,
                mixer=spec.title,
                decay=spec.decay,
                heads=_heads(sums, certified_exponents(model, layer), starts.get(layer)),
                low_read_outs=float((read_outs < LOW_READ_OUT).double().mean()),
            )
        )
    return tuple(found)


def _heads(sums: DecayTotals, certified: Tensor, start: Tensor | None) -> tuple[HeadDecay, ...]:
    read_outs = torch.cat(sums.read_out_rms)
    columns = {
        "exponent": slowest_channel(sums.exponents, 0),
        "certified": slowest_channel(certified, 0),
        "gain": sums.error_gains,
        "state_bound": sums.state_bounds,
        "read_out_median": read_outs.median(0).values,
        "read_out_smallest": read_outs.amin(0),
    }
    if start is not None:
        columns["start"] = slowest_channel(start, 0)
    numbers = {name: _finite(values) for name, values in columns.items()}
    flags = {"is_accumulator": sums.is_accumulator, "is_constant": sums.is_constant}
    marks = {name: values.tolist() for name, values in flags.items()}
    heads = len(marks["is_constant"])
    every = {**numbers, **marks}
    return tuple(
        HeadDecay.model_validate({name: values[head] for name, values in every.items()})
        for head in range(heads)
    )


def _finite(values: Tensor) -> list[float | None]:
    return [float(value) if torch.isfinite(value) else None for value in values]
