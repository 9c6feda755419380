"""`mmmamba inspect`: layers, parameters and memory of a checkpoint, and differences of two."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmmamba_cli.cli.console import (
    out,
    print_json,
    print_line,
    print_table,
    print_text,
    print_warning,
    progress,
)
from mmmamba_cli.cli.options import (
    DEFAULT_RUN,
    AsJson,
    Device,
    RunFolder,
    complete_models,
    read_lengths,
)
from mmmamba_cli.cli.stability import (
    AgainstDtype,
    Perturb,
    StabilityData,
    StabilityOut,
    StabilityRequest,
    StabilityText,
    StabilityTokens,
    Tangents,
    check_alone,
    show_stability,
)
from mmmamba_cli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmmamba_cli.checkpoint import AnyCheckpoint
    from mmmamba_cli.inspection import CheckpointSummary, MemoryEstimate, TensorDifference

NUMBER_COLUMNS = ("layers", "tensors", "parameters", "size")


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH|PRODUCT",
            help="A checkpoint, a product of the run, or `teacher` (default: the current product).",
            autocompletion=complete_models,
        ),
    ] = None,
    run: RunFolder = DEFAULT_RUN,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="T", help="Context length for the memory, such as 8k (default: 103424)."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="Dtype for the memory: bf16, fp16 or fp32 (default: as stored)."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|PRODUCT",
            help="Compare all tensors with another checkpoint.",
            autocompletion=complete_models,
        ),
    ] = None,
    stability: Annotated[
        bool,
        typer.Option(
            "--stability",
            help="Measure how long each layer remembers and what rounding does over a text.",
        ),
    ] = False,
    text: StabilityText = None,
    data: StabilityData = None,
    token_count: StabilityTokens = None,
    against_dtype: AgainstDtype = None,
    perturb: Perturb = None,
    tangents: Tangents = None,
    device: Device = None,
    out_folder: StabilityOut = None,
    as_json: AsJson = False,
) -> None:
    """Print layers, parameters and memory of any checkpoint.

    Memory is that at a context length. Reads only headers, except with --against. GGUF files,
    PyTorch state dicts and models of transformers' classes take some seconds longer, because torch
    opens them. With --stability, it loads the model and prints decays, certificates and precision
    over the length of a text instead.
    """
    request = StabilityRequest(
        text, data, token_count, against_dtype, perturb, tangents, device, out_folder
    )
    if stability:
        check_alone({"--context": context, "--dtype": dtype, "--against": against})
        show_stability(run, name, request, as_json)
        return
    request.check_unused()
    from mmmamba_cli.checkpoint import InPlaceCheckpoint
    from mmmamba_cli.inspection import DEFAULT_CONTEXT, describe, memory_of_checkpoint
    from mmmamba_cli.runs import Run, resolve_model

    tokens = DEFAULT_CONTEXT if context is None else _single_length(context)
    target = Run(run)
    found = resolve_model(target, name or target.record.current)
    if isinstance(found.opened, InPlaceCheckpoint):
        # Reads transformers' config, which needs torch.
        from mmmamba_cli.inspection.in_place_summary import describe_in_place, memory_of_in_place

        summary = describe_in_place(found.opened)
        memory = memory_of_in_place(found.name, found.opened, tokens, dtype)
    else:
        summary = describe(found.opened)
        memory = memory_of_checkpoint(found.name, found.opened, tokens, dtype)
    differences = None
    if against is not None:
        differences = _compare(found.opened, resolve_model(target, against).opened)
    if as_json:
        record: dict[str, Any] = {
            "name": found.name,
            "distilled_end_to_end": found.final,
            **asdict(summary),
            "context": tokens,
            "memory": [_memory_record(one) for one in memory],
        }
        if differences is not None:
            from mmmamba_cli.distill.metrics import nonfinite_as_text

            record["against"] = against
            record["differences"] = [nonfinite_as_text(asdict(one)) for one in differences]
        print_json(record)
        return
    if found.final is False:
        print_warning(f"{found.name} was never distilled end to end")
    _print_summary(found.name, summary)
    _print_memory(memory, tokens)
    if differences is not None:
        _print_differences(differences, found.name, str(against))


def _memory_record(estimate: MemoryEstimate) -> dict[str, Any]:
    record = asdict(estimate)
    del record["layers"]
    return {**record, "total": estimate.total}


def _single_length(text: str) -> int:
    found = read_lengths(text, "--context")
    if len(found) > 1:
        raise DataError(f"--context is {text}, expected one length", "as in --context 8k")
    return found[0]


def _compare(here: AnyCheckpoint, there: AnyCheckpoint) -> list[TensorDifference]:
    from mmmamba_cli.inspection import compare

    total = len({*here.shapes, *there.shapes})
    with progress("comparing", total, "tensors") as advance:
        return compare(here, there, advance)


def _print_summary(name: str, summary: CheckpointSummary) -> None:
    from mmmamba_cli.inspection import format_bytes, layer_plan, legend, marks_for

    marks = marks_for(out().encoding)
    files = f"{summary.files} file{'s' if summary.files > 1 else ''}"
    print_line(f"{name}: {summary.kind}, {summary.parameters / 1e6:,.1f} M parameters", "bold")
    lines = [
        ("path", summary.path),
        (
            "layout",
            f"{summary.layout}, {summary.container}, {files}, {format_bytes(summary.file_bytes)}",
        ),
        ("sizes", f"hidden {summary.hidden_size:,}, vocabulary {summary.vocab_size:,}"),
    ]
    for stack in summary.stacks:
        first = stack.first_layer
        plan = layer_plan(stack.num_layers, {i - first for i in stack.attention_layers}, marks)
        last = first + stack.num_layers - 1
        heads = f"{stack.num_heads} query and {stack.num_kv_heads} key/value heads"
        lines += [
            (stack.name, f"{plan}  layers {first} to {last}"),
            ("", f"{heads} of {stack.head_dim}, MLP {stack.intermediate_size:,}"),
        ]
    lines += [("", legend(marks)), *_mixers(summary)]
    dtypes = (f"{key} {n} tensors, {format_bytes(b)}" for key, (n, b) in summary.dtypes.items())
    lines.append(("stored as", "; ".join(dtypes)))
    lines.append(("tokenizer", summary.tokenizer or "none"))
    lines.append(("vision", _vision(summary)))
    if summary.assumed:
        lines.append(("assumed", f"{', '.join(summary.assumed)} (it has no config)"))
    _print_pairs(lines)
    rows = [
        (
            part.name,
            part.layers or None,
            part.tensors,
            f"{part.parameters:,}",
            format_bytes(part.nbytes),
        )
        for part in summary.parts
    ]
    print_table(("part", "layers", "tensors", "parameters", "size"), rows, right=NUMBER_COLUMNS)


def _mixers(summary: CheckpointSummary) -> list[tuple[str, str]]:
    """The mixers that are not the default of their layer type, their options, slow decoding."""
    from mmmamba_cli.inspection import format_ranges

    lines: list[tuple[str, str]] = []
    for mixer in summary.mixers:
        plural = "s" if len(mixer.layers) > 1 else ""
        layers = f"{mixer.title} in layer{plural} {format_ranges(mixer.layers)}"
        if not mixer.is_default:
            lines.append(("" if lines else "mixers", layers))
    options = _options(summary)
    if options:
        lines.append(("options", options))
    if summary.slow_decoding is not None:
        lines.append(("decoding", f"token by token by generate: {summary.slow_decoding}"))
    return lines


def _options(summary: CheckpointSummary) -> str:
    """Options of the mixers, without those of the default mixer that have their default."""
    from mmmamba_cli.architecture import LINEAR, MixerConfig, default_mixer, mixer_spec

    usual, default = mixer_spec(default_mixer(LINEAR)).options, vars(MixerConfig())
    return ", ".join(
        f"{name} {str(value).lower()}"
        for name, value in summary.mixer.items()
        if name not in usual or value != default[name]
    )


def _vision(summary: CheckpointSummary) -> str:
    vision = summary.vision
    if vision is None:
        return "none, text only"
    if "model_type" in vision:
        return f"tower {vision['model_type']}"
    return (
        f"tiles of {vision['image_size']} pixels, patches of {vision['patch_size']}, "
        f"pixel shuffle {vision['pixel_shuffle']}"
    )


def _print_pairs(lines: Sequence[tuple[str, str]]) -> None:
    """Print names and descriptions in two columns, wrapped to the terminal."""
    from rich.table import Table
    from rich.text import Text

    console = out()
    if not console.is_terminal:
        print_text("".join(f"{name:<10} {text}\n" for name, text in lines))
        return
    grid = Table.grid(padding=(0, 2))
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(text))
    console.print(grid)
    console.print()


def _layer_sum(values: Sequence[int]) -> str:
    """The sum of bytes over layers, with the bytes of one if all that have some have as many."""
    from mmmamba_cli.inspection import format_bytes

    found = [value for value in values if value]
    if not found:
        return "-"
    each = f"{len(found)} x {format_bytes(found[0])}"
    if len(set(found)) > 1:
        each = f"{len(found)} layers"
    return f"{format_bytes(sum(found))} ({each})"


def _print_memory(memory: Sequence[MemoryEstimate], context: int) -> None:
    from mmmamba_cli.inspection import format_bytes

    rows = [
        ("weights", *(format_bytes(one.weights) for one in memory)),
        ("keys and values", *(_layer_sum([m.kv_cache for m in one.layers]) for one in memory)),
        ("conv states", *(_layer_sum([m.conv_state for m in one.layers]) for one in memory)),
        ("SSM states", *(_layer_sum([m.ssm_state for m in one.layers]) for one in memory)),
        ("total", *(format_bytes(one.total) for one in memory)),
    ]
    names = tuple(one.name for one in memory)
    print_table(
        ("memory", *names), rows, title=f"\nAt {context:,} tokens of context, one row", right=names
    )
    if len(memory) > 1:
        here, teacher = memory
        print_line(
            f"{here.total / teacher.total:.1%} of what attention in every layer takes; "
            f"without weights, {here.state / teacher.state:.2%}"
        )


def _print_differences(differences: Sequence[TensorDifference], here: str, there: str) -> None:
    from mmmamba_cli.inspection import format_ranges, group_by_layer
    from mmmamba_cli.inspection.diff import EQUAL, ONLY_HERE, ONLY_THERE

    groups = group_by_layer(differences)
    equal = sum(group.tensors for group in groups if group.status == EQUAL)
    called = {ONLY_HERE: "only in a", ONLY_THERE: "only in b"}
    rows = [
        (
            group.name.removeprefix("model.").removeprefix("layers.*."),
            called.get(group.status, group.status),
            format_ranges(group.layers) or None,
            None if group.largest is None else f"{group.largest:.3g}",
            None if group.relative is None else f"{group.relative:.3g}",
        )
        for group in groups
        if group.status != EQUAL
    ]
    if rows:
        print_table(
            ("tensor", "is", "layers", "max |a-b|", "|a-b| / |b|"),
            rows,
            title=f"\n{here} (a) against {there} (b)",
            right=("max |a-b|", "|a-b| / |b|"),
        )
    print_line(f"{equal} of {len(differences)} tensors are equal")
