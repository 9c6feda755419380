"""All measurements of `mmmamba inspect --stability` on one model and one text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.checkpoint import InPlaceCheckpoint, load_in_place_model, parse_dtype
from mmmamba_cli.errors import DataError
from mmmamba_cli.inference import quantize
from mmmamba_cli.model import HolisticVLM
from mmmamba_cli.model.cache import new_cache
from mmmamba_cli.runs import ResolvedModel, pick_placement
from mmmamba_cli.runs.manifest import command_line, package_versions, utc_timestamp
from mmmamba_cli.stability.decay_spectrum import (
    DecayObserver,
    DecayTotals,
    observed_mixers,
)
from mmmamba_cli.stability.divergence import (
    BLOCK_TOKENS,
    Divergence,
    count_spikes,
    divergence,
    join_divergences,
    length_slope,
    spans,
)
from mmmamba_cli.stability.layer_records import LOW_READ_OUT, layer_records
from mmmamba_cli.stability.model_layers import (
    TextPass,
    decaying_layers,
    input_gain,
)
from mmmamba_cli.stability.perturbation import (
    disturbed_states,
    fill_cache,
    follow_deviation,
    log_places,
    predicted_deviation,
    rounded_randomly,
)
from mmmamba_cli.stability.stability_record import (
    DeviationRecord,
    PrecisionRecord,
    SlopeRecord,
    SpanDivergence,
    StabilityRecord,
    TangentRecord,
)
from mmmamba_cli.stability.tangents import lacks_tangents, tangent_growth

# Value of `StabilityOptions.against_dtype` that is no floating dtype.
INT8 = "int8"
# Columns that pass through the models at a time; bounds the memory of the logits.
CHUNK_TOKENS = 512
# Tokens that fill the states before they are disturbed.
WARM_UP_TOKENS = 256

Advance = Callable[[int], None]


@dataclass(frozen=True)
class StabilityOptions:
    """What is measured.

    Attributes:
        against_dtype: what is compared with fp32: the dtype "bf16" or "fp16", or "int8" for weights
            quantized as for decoding, with activations in fp32.
        perturb: by how much states are set off, relative to their norm; 0 leaves out this and the
            disturbance of the inputs.
        tangents: number of tangent vectors; 0 leaves them out, which take most of the time.
        device: as in `ResolvedModel.load`.
        seed: of the random directions.
    """

    against_dtype: str = "bf16"
    perturb: float = 1e-3
    tangents: int = 0
    device: str | None = None
    seed: int = 0


def count_passes(options: StabilityOptions, in_place: bool = False) -> int:
    """How often the text passes through a model, for a progress bar.

    `in_place`: the model is one of transformers.
    """
    if in_place:
        return 2
    return 2 + (4 if options.perturb else 0) + (1 if options.tangents else 0)


def measure_stability(
    resolved: ResolvedModel,
    ids: Sequence[int],
    text: str,
    options: StabilityOptions,
    advance: Advance = lambda tokens: None,
) -> StabilityRecord:
    """Measure a model on the token ids of a text; `text` says what text it is.

    The reference is the model in fp32. `advance` is called with numbers of tokens, in all
    `count_passes` times those of the text.

    Of a model of transformers, decays, certificates and precision are measured.

    Raises:
        DataError: a dtype that is not narrower than fp32, or int8 for a model of transformers.
        CheckpointError: an unknown dtype or damaged tensors.
        MmmambaError: a mixer in place that does not read the output of an RMSNorm.
    """
    check_narrower(options.against_dtype)
    in_place = isinstance(resolved.opened, InPlaceCheckpoint)
    if in_place and options.against_dtype == INT8:
        raise DataError(
            f"--against-dtype is {INT8}, which models of transformers do not have here",
            "give bf16 or fp16",
        )
    device, _ = pick_placement(options.device, "fp32")
    reference = load_any(resolved, device, torch.float32)
    for layer in decaying_layers(reference):
        input_gain(reference, layer)
    other = _narrower(resolved, options.against_dtype, device)
    batch = torch.tensor([ids], device=device)
    with torch.inference_mode():
        totals, found = _lockstep(reference, other, batch, advance)
    del other
    deviations = () if in_place else _deviations(reference, batch, options, advance)
    not_measured = _left_out(options) if in_place else []
    tangents = None
    if options.tangents and not in_place:
        reason = lacks_tangents(reference)
        if reason is not None:
            not_measured.append(reason)
        else:
            # Kernels have no derivative in forward mode; on a CPU the ops are plain PyTorch.
            tangents = measure_tangents(reference.cpu(), batch.cpu(), options, advance)
    return StabilityRecord(
        name=resolved.name,
        content_hash=resolved.content_hash,
        text=text,
        tokens=len(ids),
        command=command_line(),
        created=utc_timestamp(),
        device=str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        versions=package_versions(),
        seed=options.seed,
        layers=layer_records(reference, totals, _seeded_exponents(resolved, totals)),
        low_read_out=LOW_READ_OUT,
        precision=_precision(found, options.against_dtype),
        deviations=deviations,
        tangents=tangents,
        not_measured=tuple(not_measured),
    )


def _left_out(options: StabilityOptions) -> list[str]:
    """What was asked for and is not measured of a model of transformers."""
    named = ["deviations after a disturbance"] * bool(options.perturb)
    named += ["exponents by tangents"] * bool(options.tangents)
    return [f"{what}: not for models of transformers" for what in named]


def load_any(resolved: ResolvedModel, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of either kind, in eval mode, without gradients."""
    if isinstance(resolved.opened, InPlaceCheckpoint):
        return load_in_place_model(resolved.opened, device=device, dtype=dtype, frozen=True)
    return resolved.load(device, dtype)


def check_narrower(dtype: str) -> None:
    """Raise `DataError` for a floating dtype that is not narrower than fp32.

    Raises `CheckpointError` for an unknown one.
    """
    if dtype != INT8 and parse_dtype(dtype).itemsize >= torch.float32.itemsize:
        raise DataError(
            f"--against-dtype is {dtype}, expected a dtype narrower than fp32",
            "give bf16, fp16 or int8",
        )


def _narrower(resolved: ResolvedModel, dtype: str, device: torch.device) -> Any:
    if dtype != INT8:
        return load_any(resolved, device, parse_dtype(dtype))
    model = resolved.load(device, torch.float32)
    quantize(model)
    return model


def _lockstep(
    reference: Any, other: Any, ids: Tensor, advance: Advance
) -> tuple[dict[int, DecayTotals], Divergence]:
    """Pass a text through both models chunk by chunk: decays of the reference, and differences."""
    observer = DecayObserver(reference)
    passes = [TextPass(model, ids.shape[1]) for model in (reference, other)]
    parts = []
    with observed_mixers(reference, observer.on_call, observer.on_read_out):
        for chunk in ids.split(CHUNK_TOKENS, dim=1):
            here, there = (one.logits(chunk) for one in passes)
            found = divergence(here, there)
            parts.append(Divergence(found.kl.cpu(), found.max_abs.cpu(), found.same_top1.cpu()))
            advance(2 * chunk.shape[1])
    return observer.totals, join_divergences(parts)


def _seeded_exponents(resolved: ResolvedModel, totals: dict[int, DecayTotals]) -> dict[int, Tensor]:
    """log gamma at an input of zeros of the product that a run's product was seeded as.

    With `init: inherit+mimic` that of every token. Empty if the run no longer has that product, and
    for students in place.
    """
    if resolved.origin != "product" or resolved.run is None or resolved.run.is_in_place:
        return {}
    run = resolved.run
    line = [
        run.product(resolved.name),
        *(one for _, one in run.ancestors(run.product(resolved.name))),
    ]
    seeds = [one for one in line if one.made_by == "seed"]
    if not seeds or seeds[0].name == resolved.name:
        return {}
    model = ResolvedModel(seeds[0].name, run.open_product(seeds[0].name), "product", run).load(
        "cpu", torch.float32
    )
    zeros = torch.zeros(1, 1, model.config.hidden_size)
    mixers = decaying_layers(model)
    return {layer: mixers[layer].log_decay(zeros)[0, 0] for layer in totals if layer in mixers}


def _precision(found: Divergence, dtype: str) -> PrecisionRecord:
    slope, spikes = length_slope(found.kl), count_spikes(found)
    blocks = found.kl.split(BLOCK_TOKENS)
    return PrecisionRecord(
        dtype=dtype,
        spans=tuple(
            SpanDivergence(
                begin=begin,
                end=end,
                mean_kl=float(found.kl[begin:end].mean()),
                largest_kl=float(found.kl[begin:end].max()),
                largest_difference=float(found.max_abs[begin:end].max()),
                same_top1=float(found.same_top1[begin:end].double().mean()),
            )
            for begin, end in spans(len(found.kl))
        ),
        slope=None
        if slope is None
        else SlopeRecord(value=slope.value, low=slope.low, high=slope.high, blocks=slope.blocks),
        median_kl=float(found.kl.median()),
        spikes=spikes.positions,
        top1_changes=spikes.changes,
        top1_changes_at_spikes=spikes.changes_at_spikes,
        block_kl=tuple(float(block.mean()) for block in blocks),
    )


@torch.inference_mode()
def _deviations(
    model: HolisticVLM,
    ids: Tensor,
    options: StabilityOptions,
    advance: Advance,
) -> tuple[DeviationRecord, ...]:
    """Inputs off by a rounding at every token, and states set off once."""
    if not options.perturb:
        return ()
    tokens = ids.shape[1]
    places = log_places(tokens)
    rounding = "bf16" if options.against_dtype == INT8 else options.against_dtype
    embedded = model.model.text_embedding(ids)
    embeddings = rounded_randomly(embedded, parse_dtype(rounding), options.seed)
    found = follow_deviation(
        model, ids, places, other_embeddings=embeddings, chunk_size=CHUNK_TOKENS
    )
    advance(2 * tokens)
    records = [
        DeviationRecord(
            what="input",
            dtype=rounding,
            tokens=places,
            layers=_relative(found.states, found.state_norms),
            logits=_between(found.logits, places),
        )
    ]
    mixers = decaying_layers(model)
    if mixers:
        warm_up = min(WARM_UP_TOKENS, tokens // 4)
        cache = new_cache(model.config)
        fill_cache(model, cache, ids[:, :warm_up], tokens, CHUNK_TOKENS)
        disturbed, deltas = disturbed_states(model, cache, options.perturb, options.seed)
        places = log_places(tokens - warm_up)
        found = follow_deviation(
            model,
            ids[:, warm_up:],
            places,
            reference=cache,
            disturbed=disturbed,
            total=tokens,
            chunk_size=CHUNK_TOKENS,
        )
        first = min(mixers)
        predicted = predicted_deviation(deltas[first], found.log_decays[first])
        norms = found.state_norms[first]
        records.append(
            DeviationRecord(
                what="state",
                size=options.perturb,
                tokens=places,
                layers=_relative(found.states, found.state_norms),
                logits=_between(found.logits, places),
                predicted=tuple((_root_sum(predicted) / _root_sum(norms)).tolist()),
            )
        )
    advance(2 * tokens)
    return tuple(records)


def _relative(states: dict[int, Tensor], norms: dict[int, Tensor]) -> dict[int, tuple[float, ...]]:
    """|dS| / |S| of each layer over all heads, at each place."""
    return {
        layer: tuple((_root_sum(states[layer]) / _root_sum(norms[layer])).tolist())
        for layer in states
    }


def _root_sum(norms: Tensor) -> Tensor:
    """The norm over heads, (C, H) to (C,)."""
    return torch.linalg.vector_norm(norms, dim=-1)


def _between(values: Tensor, places: Sequence[int]) -> tuple[float, ...]:
    """The mean of (T,) values since the place before."""
    begins = (0, *places[:-1])
    return tuple(float(values[begin:end].mean()) for begin, end in zip(begins, places, strict=True))


def measure_tangents(
    model: HolisticVLM,
    ids: Tensor,
    options: StabilityOptions,
    advance: Advance = lambda tokens: None,
) -> TangentRecord:
    """Exponents of the whole recurrence over both halves of `ids` (1, T), beside those of heads."""
    growth = tangent_growth(model, ids, options.tangents, seed=options.seed, advance=advance)
    half = ids.shape[1] // 2
    cache = new_cache(model.config)
    largest = []
    with torch.inference_mode():
        for part in (ids[:, :half], ids[:, half:]):
            observer = DecayObserver(model)
            with observed_mixers(model, observer.on_call):
                fill_cache(model, cache, part, ids.shape[1], CHUNK_TOKENS)
            largest.append(max(float(one.exponents.max()) for one in observer.totals.values()))
    return TangentRecord(
        vectors=options.tangents,
        tokens=ids.shape[1],
        halves=(float(growth.exponents(0, half)[0]), float(growth.exponents(half)[0])),
        head_exponents=(largest[0], largest[1]),
        largest_growth=growth.largest_growth,
    )
