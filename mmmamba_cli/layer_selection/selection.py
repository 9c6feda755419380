"""Selection of attention layers: score every layer, resume, and choose within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_cli.devices import OutOfMemory, pick_device, translate_out_of_memory
from mmmamba_cli.distributed import limit_cpu_threads
from mmmamba_cli.errors import DataError, MmmambaError, RunError
from mmmamba_cli.hybridize import LayerSelection
from mmmamba_cli.layer_selection.budget import Budget, CountBudget
from mmmamba_cli.layer_selection.layer_scores import (
    SELECTION,
    Agreement,
    LayerScore,
    LayerScores,
    file_digest,
    half_agreement,
    read_given_scores,
    read_layer_scores,
    settings_key,
    write_layer_scores,
)
from mmmamba_cli.layer_selection.measurement import Measurement, score_unit
from mmmamba_cli.layer_selection.options import (
    GREEDY_METHODS,
    SelectionCallbacks,
    SelectionOptions,
)
from mmmamba_cli.recipe import SCORES_FILE_PREFIX, Recipe
from mmmamba_cli.runs import Manifest, Run

# Makes a budget from the columns of the embedding stack for each column of the language stack.
MakeBudget = Callable[[float], Budget]


@dataclass(frozen=True)
class MeasuredLayers:
    """The scores by which layers were ranked, best first, and the layers chosen.

    With `greedy` the chosen layers come first, in the order of choice, with the score of their
    round; the others follow with the score of the last round.
    """

    ranking: tuple[LayerScore, ...]
    selection: LayerSelection
    method: str
    unit: str
    file: Path
    agreement: Agreement | None


def select_layers(
    run: Run,
    parent: Manifest,
    recipe: Recipe,
    make_budget: MakeBudget,
    options: SelectionOptions,
    callbacks: SelectionCallbacks,
) -> MeasuredLayers:
    """Score the layers of a linear student, and choose those that get the teacher's attention.

    Scores lie in the run under `selection/`, in a file for each method and set of inputs, and are
    written after each layer: a second call resumes. The caller holds the run's lock.

    Raises:
        RunError: the student has attention already or is a transformers model, or it or the teacher
            is not the one recorded.
        DataError: the data cannot be used, or the method cannot measure anything on them.
    """
    if run.is_in_place:
        raise RunError(
            f"the students of {run.folder} have mixers in a transformers model, whose layers "
            "--select does not score yet",
            "give --attn-layers N with --placement, or --layers I,J",
        )
    if parent.attention_layers:
        raise RunError(
            f"{parent.name!r} has attention in some layers, and --select scores the layers of a "
            "linear student",
            "give a linear student with --from",
        )
    if options.greedy and options.method not in GREEDY_METHODS:
        raise DataError(
            f"--greedy is not possible with --select {options.method}",
            f"use --select {' or '.join(GREEDY_METHODS)}, or leave out --greedy",
        )
    measurement = Measurement(run, parent, recipe, options, callbacks, pick_device(options.device))
    if options.method.startswith(SCORES_FILE_PREFIX):
        return _choose_by_file(measurement, make_budget)
    if not parent.stages:
        callbacks.say(f"{parent.name} has not been trained: scores of untrained mixers say little")
    file, scores = _open_scores(measurement)
    with limit_cpu_threads(measurement.device):
        try:
            return translate_out_of_memory(lambda: _measure(measurement, file, scores, make_budget))
        except OutOfMemory as error:
            raise MmmambaError(
                f"scoring layers ran out of memory: {error}",
                "lower --samples; hidden states of all samples are in memory",
            ) from error


def select_planned_layers(
    run: Run,
    recipe: Recipe,
    parent: Manifest,
    callbacks: SelectionCallbacks,
    *,
    device: str | None = None,
    teacher: Path | None = None,
) -> LayerSelection:
    """Choose as many layers as a recipe with `layers.select` asks for, with its method and seed.

    Raises what `select_layers` raises.
    """
    count, method = recipe.layers.attention, recipe.layers.select
    assert isinstance(count, int) and method is not None  # checked by the recipe
    options = SelectionOptions(method, seed=recipe.seed, device=device, teacher=teacher)
    measured = select_layers(
        run, parent, recipe, lambda ratio: CountBudget(count), options, callbacks
    )
    return measured.selection


def _open_scores(measurement: Measurement) -> tuple[Path, LayerScores | None]:
    """The file of the measurement, and the scores that it has already."""
    inputs = measurement.inputs()
    folder, method = measurement.run.folder / SELECTION, measurement.options.method
    file = folder / f"{method}-{settings_key(inputs)}.json"
    if file.is_file():
        scores = read_layer_scores(file)
        if scores.inputs != inputs:
            raise RunError(
                f"{file} has scores of other inputs than its name says",
                "delete it to measure again",
            )
        return file, scores
    for other in sorted(folder.glob(f"{method}-*.json")):
        changed = _changed_inputs(read_layer_scores(other).inputs, inputs)
        if changed is not None:
            measurement.callbacks.say(
                f"scores in {other.name} are not reused, changed since: {', '.join(changed)}"
            )
    return file, None


def _changed_inputs(before: dict[str, Any], now: dict[str, Any]) -> list[str] | None:
    """The inputs that differ; None for another method, whose names share a beginning."""
    if before.get("method") != now["method"]:
        return None
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _measure(
    measurement: Measurement, file: Path, scores: LayerScores | None, make_budget: MakeBudget
) -> MeasuredLayers:
    """Score layers until the budget is chosen, and write each score."""
    options = measurement.options
    if scores is None:
        scores = LayerScores(
            method=options.method,
            unit=score_unit(options.method, measurement.kl),
            num_layers=measurement.parent.num_layers,
            embedding_ratio=measurement.probe.embedding_ratio,
            inputs=measurement.inputs(),
        )
    budget = make_budget(scores.embedding_ratio)
    kept: list[int] = []
    ranking: list[LayerScore] = []
    # Both halves are compared where all layers were scored.
    agreement: Agreement | None = None
    while True:
        scores = _score_round(measurement, file, scores, kept)
        found = {one.layer: one for one in scores.round_of(kept).layers}
        values = {layer: one.score for layer, one in found.items()}
        agreement = agreement or half_agreement(list(found.values()))
        if not options.greedy:
            chosen = budget.choose(values)
            ranking = _ranked(found.values())
            return _measured(measurement, file, ranking, chosen, budget, agreement)
        layer = budget.next_layer(values, kept)
        ranking.append(found.pop(layer))
        kept.append(layer)
        if not budget.has_room(kept, scores.num_layers):
            ranking += _ranked(found.values())
            return _measured(measurement, file, ranking, kept, budget, agreement)


def _score_round(
    measurement: Measurement, file: Path, scores: LayerScores, kept: Sequence[int]
) -> LayerScores:
    """Measure the layers that the round of `kept` lacks; the file is written after each."""
    done = {one.layer for one in scores.round_of(kept).layers}
    left = [i for i in range(scores.num_layers) if i not in done and i not in kept]
    if not left:
        return scores
    stacks = measurement.stacks()
    title = f"scoring layers by {measurement.options.method}"
    if kept:
        title += f", {len(kept)} chosen"
    if done:
        measurement.callbacks.say(
            f"{len(done)} of {len(done) + len(left)} layers have been scored before"
        )
    with measurement.callbacks.progress(title, len(left)) as advance:
        method = measurement.method(kept)
        for layer in left:
            worth = method.measure(layer)
            worth.check(layer)
            score = LayerScore.model_validate(
                {
                    "layer": layer,
                    "stack": stacks[layer],
                    "score": worth.mean(),
                    "halves": worth.halves(),
                    "error": worth.standard_error(),
                }
            )
            scores = scores.with_score(kept, score)
            write_layer_scores(file, scores)
            advance(1)
    return scores


def _choose_by_file(measurement: Measurement, make_budget: MakeBudget) -> MeasuredLayers:
    file = Path(measurement.options.method.removeprefix(SCORES_FILE_PREFIX)).expanduser()
    scores, ratio = read_given_scores(file, measurement.stacks())
    budget = make_budget(ratio)
    chosen = budget.choose({one.layer: one.score for one in scores})
    return _measured(measurement, file, _ranked(scores), chosen, budget, None)


def _ranked(scores: Iterable[LayerScore]) -> list[LayerScore]:
    return sorted(scores, key=lambda one: (-one.score, one.layer))


def _measured(
    measurement: Measurement,
    file: Path,
    ranking: Sequence[LayerScore],
    chosen: Sequence[int],
    budget: Budget,
    agreement: Agreement | None,
) -> MeasuredLayers:
    options = measurement.options
    in_run = file.is_relative_to(measurement.run.folder)
    record = {
        "method": options.method,
        "scores": str(file.relative_to(measurement.run.folder) if in_run else file),
        "scores_sha256": file_digest(file),
        "budget": budget.record(),
        "greedy": options.greedy,
        "halves_spearman": None if agreement is None else agreement.spearman,
    }
    return MeasuredLayers(
        ranking=tuple(ranking),
        selection=LayerSelection(tuple(sorted(chosen)), record),
        method=options.method,
        unit=score_unit(options.method, measurement.kl),
        file=file,
        agreement=agreement,
    )
