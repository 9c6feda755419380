"""`mmmamba inspect --stability`: its options, the measurement, tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmmamba_cli.cli.console import print_json, print_line, print_table, print_text, progress
from mmmamba_cli.cli.options import check_output_folder, read_lengths
from mmmamba_cli.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from mmmamba_cli.runs import ResolvedModel
    from mmmamba_cli.stability import DeviationRecord, LayerStability, StabilityRecord
    from mmmamba_cli.stability.texts import TextEncoder

# Rows of the table of deviations.
MAX_PLACES = 8

StabilityText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="With --stability: text to measure on (default: an installed one).",
    ),
]
StabilityData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="With --stability: conversations to measure on, without their pictures.",
    ),
]
StabilityTokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="N",
        help="With --stability: tokens of the text, such as 8k (default: up to 4096).",
    ),
]
AgainstDtype = Annotated[
    str | None,
    typer.Option(
        "--against-dtype",
        metavar="DTYPE",
        help="With --stability: dtype compared with fp32: bf16, fp16, or int8 for "
        "quantized weights (default: bf16).",
    ),
]
Perturb = Annotated[
    float | None,
    typer.Option(
        "--perturb",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="With --stability: disturb states by this share of their norm, and inputs by one "
        "rounding; 0 for neither (default: 0.001).",
    ),
]
Tangents = Annotated[
    int | None,
    typer.Option(
        "--tangent",
        metavar="K",
        min=0,
        max=64,
        help="With --stability: vectors for exponents of the whole student, token by token; 0 for "
        "none (default: 0).",
    ),
]
StabilityOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="With --stability: folder for stability.json and pictures (default: stability/NAME "
        "of the run).",
    ),
]


@dataclass(frozen=True)
class StabilityRequest:
    """The options behind `--stability`; None where one was not given."""

    text: Path | None
    data: Path | None
    tokens: str | None
    against_dtype: str | None
    perturb: float | None
    tangents: int | None
    device: str | None
    out: Path | None

    def check_unused(self) -> None:
        """Raise `DataError` if one was given without `--stability`."""
        names = ("text", "data", "tokens", "against-dtype", "perturb", "tangent", "device", "out")
        for name, value in zip(names, vars(self).values(), strict=True):
            if value is not None:
                raise DataError(f"--{name} is an option of --stability", "add --stability")


def check_alone(options: Mapping[str, object]) -> None:
    """Raise `DataError` if an option that says nothing with `--stability` was given."""
    for name, value in options.items():
        if value is not None:
            raise DataError(f"{name} cannot be used with --stability", "leave one of them out")


def show_stability(
    run_folder: Path, name: str | None, request: StabilityRequest, as_json: bool
) -> None:
    """Measure a model and print the result; keep it as a file of its run, or in `--out`."""
    from mmmamba_cli.runs import Run, resolve_model

    run = Run(run_folder)
    resolved = resolve_model(run, name or run.record.current)
    folder = request.out or _result_folder(resolved)
    if folder is not None:
        check_output_folder(folder)
    record = _measure(resolved, request)
    if folder is not None:
        _write(folder, record)
    if as_json:
        print_json(record.model_dump(mode="json"))
        return
    print_stability(record)
    if folder is not None:
        print_line(f"written to {folder}", to_stderr=True)


def _measure(resolved: ResolvedModel, request: StabilityRequest) -> StabilityRecord:
    from mmmamba_cli.checkpoint import InPlaceCheckpoint
    from mmmamba_cli.stability import (
        StabilityOptions,
        conversation_text,
        count_passes,
        encode_text,
        measure_stability,
        read_text,
        sample_text,
    )

    tokens = None if request.tokens is None else _single_length(request.tokens)
    if request.text is not None and request.data is not None:
        raise DataError("--text and --data were given, expected one of them", "leave one out")
    encoder = _text_encoder(resolved)
    if request.text is not None:
        label, text = request.text.name, read_text(request.text)
    elif request.data is not None:
        label, text = request.data.name, conversation_text(request.data, tokens)
    else:
        label, text = "the installed text", sample_text()
    ids = encode_text(encoder, text, label, tokens)
    default = StabilityOptions()
    options = StabilityOptions(
        against_dtype=request.against_dtype or default.against_dtype,
        perturb=default.perturb if request.perturb is None else request.perturb,
        tangents=request.tangents or default.tangents,
        device=request.device,
    )
    passes = count_passes(options, in_place=isinstance(resolved.opened, InPlaceCheckpoint))
    with progress("measuring", passes * len(ids), "tokens") as advance:
        return measure_stability(resolved, ids, label, options, advance)


def _text_encoder(resolved: ResolvedModel) -> TextEncoder:
    """Raises `CheckpointError` if the model has no tokenizer."""
    from mmmamba_cli.checkpoint import InPlaceCheckpoint
    from mmmamba_cli.runs import open_training_processor
    from mmmamba_cli.stability import TokenizerEncoder

    purpose, hint = "measured on a text", "give a folder with the tokenizer of the model"
    if not isinstance(resolved.opened, InPlaceCheckpoint):
        return resolved.require_processor(purpose, hint)
    processor = open_training_processor(resolved.opened)
    if processor is None:
        raise CheckpointError(
            f"{resolved.opened.path} has no tokenizer, so it cannot be {purpose}", hint
        )
    return TokenizerEncoder(processor.tokenizer)


def _single_length(text: str) -> int:
    found = read_lengths(text, "--tokens")
    if len(found) > 1:
        raise DataError(f"--tokens is {text}, expected one length", "as in --tokens 8k")
    return found[0]


def _result_folder(resolved: ResolvedModel) -> Path | None:
    """The folder of a model of a run; None for other models."""
    from mmmamba_cli.stability import STABILITY

    return None if resolved.run is None else resolved.run.folder / STABILITY / resolved.name


def _write(folder: Path, record: StabilityRecord) -> None:
    from mmmamba_cli.checkpoint import atomic_write_text
    from mmmamba_cli.reporting import write_stability_pictures
    from mmmamba_cli.stability import STABILITY_FILE

    folder.mkdir(parents=True, exist_ok=True)
    write_stability_pictures(folder, record)
    atomic_write_text(folder / STABILITY_FILE, record.model_dump_json(indent=1) + "\n")


def print_stability(record: StabilityRecord) -> None:
    """Print the findings, then the numbers."""
    from mmmamba_cli.stability import find_sentences

    print_line(f"{record.name}: stability over {record.tokens:,} tokens of {record.text}", "bold")
    print_text()
    for sentence in find_sentences(record):
        print_line(f"- {sentence}")
    for sentence in record.not_measured:
        print_line(f"- not measured: {sentence}")
    decaying = [layer for layer in record.layers if layer.heads]
    if decaying:
        _print_decays(decaying)
    _print_precision(record)
    for found in record.deviations:
        if any(found.logits):
            _print_deviation(found)


def _print_decays(layers: Sequence[LayerStability]) -> None:
    # Light commands do without it.
    from statistics import median

    from mmmamba_cli.stability import format_tokens, half_life

    heading = (
        *("layer", "largest", "median", "smallest"),
        *("half-life", "certified", "gain", "read-out"),
    )
    rows = []
    for layer in layers:
        exponents = [head.exponent for head in layer.heads]
        gains = [head.gain for head in layer.heads]
        rows.append(
            (
                layer.layer,
                *(f"{value:.4f}" for value in (max(exponents), median(exponents), min(exponents))),
                format_tokens(half_life(max(exponents))),
                f"{max(head.certified for head in layer.heads):.0e}",
                None if None in gains else f"{max(gain or 0.0 for gain in gains):,.0f}",
                f"{min(head.read_out_smallest for head in layer.heads):.0e}",
            )
        )
    _print_titled("Mean log gamma of the heads, per token", heading, rows)


def _print_precision(record: StabilityRecord) -> None:
    found = record.precision
    if found is None:
        return
    rows = [
        (
            f"{span.begin:,} to {span.end - 1:,}",
            f"{span.mean_kl:.1e}",
            f"{span.largest_kl:.1e}",
            f"{span.largest_difference:.3f}",
            f"{span.same_top1:.1%}",
        )
        for span in found.spans
    ]
    heading = ("positions", "mean KL", "largest KL", "max |difference|", "same top-1")
    title = f"{found.dtype} against fp32: logits at the same tokens"
    _print_titled(title, heading, rows)


def _print_deviation(found: DeviationRecord) -> None:
    step = max(1, len(found.tokens) // MAX_PLACES)
    places = sorted({0, len(found.tokens) - 1, *range(0, len(found.tokens), step)})
    layers = list(found.layers)
    shown = layers if len(layers) < 3 else [layers[0], layers[len(layers) // 2], layers[-1]]
    heading = (
        "tokens",
        "logits",
        *(f"layer {layer}" for layer in shown),
        *(("predicted",) if found.predicted else ()),
    )
    rows = [
        (
            f"{found.tokens[place]:,}",
            f"{found.logits[place]:.1e}",
            *(f"{found.layers[layer][place]:.1e}" for layer in shown),
            *((f"{found.predicted[place]:.1e}",) if found.predicted else ()),
        )
        for place in places
    ]
    what = f"states are off once by {found.size or 0:g} of their norm"
    if found.what == "input":
        what = f"inputs are off by one rounding to {found.dtype} at every token"
    _print_titled(f"Deviation: {what}", heading, rows)


def _print_titled(title: str, heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table below a line of its own, which a title would wrap to the width of the table."""
    print_text()
    print_line(title, "italic")
    print_table(heading, rows, right=heading)
