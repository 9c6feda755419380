"""`kl`: the teacher's attention restored in one layer, then a short end-to-end training.

The score of a layer is how much lower the held-out KL is after the training of the hybrid than
after the same training of the student without it (arXiv 2512.20569, one-layer restoration).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmmamba_cli.data import StepLoader
from mmmamba_cli.distill.kl_loss import LogitsKL
from mmmamba_cli.distill.optimiser import build_optimiser, clip_gradients, learning_rate
from mmmamba_cli.distributed import seed_everything, step_seed
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.layer_selection.kl_zero import divergence_sums, teacher_hidden
from mmmamba_cli.layer_selection.probe_samples import ProbeSamples, SampleSums
from mmmamba_cli.recipe import KL, Stage


class TrainedRestoration:
    """A `LayerMethod`: the fall of the divergence after training, in nats for each scored token.

    `stage` says what learns and how, for `stage.steps` steps from the weights of the student.
    `kept` are layers in which the student has the teacher's attention already.
    """

    def __init__(
        self,
        probe: ProbeSamples,
        kept: Collection[int],
        stage: Stage,
        loader: StepLoader,
        seed: int,
    ):
        self._probe, self._stage, self._loader, self._seed = probe, stage, loader, seed
        self._kept = tuple(kept)
        self._parameters = probe.pair.trainable_parameters()
        # The start of every training.
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._teacher_hidden = list(teacher_hidden(probe))
        self._before = self._trained(self._kept)

    def measure(self, layer: int) -> SampleSums:
        after = self._trained((*self._kept, layer))
        return SampleSums(self._before - after, self._probe.count_scored())

    def _trained(self, layers: Collection[int]) -> Tensor:
        """(S,) divergence of each sample after a training with attention in `layers`."""
        pair = self._probe.pair
        with _restored(pair.student.model.layers, pair.teacher.model.layers, layers):
            self._train(_without_layers(self._parameters, layers))
            pair.student.eval()
            found = []
            for number, batch in enumerate(self._probe.batches):
                with torch.no_grad(), pair.autocast():
                    hidden = pair.student.model.forward_prepared(pair.prepare(batch))
                states = self._teacher_hidden[number]
                found.append(divergence_sums(self._probe, number, states, hidden))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._start[name])
        return torch.cat(found)

    def _train(self, parameters: Mapping[str, nn.Parameter]) -> None:
        pair, stage = self._probe.pair, self._stage
        objective = LogitsKL(stage.kl or KL(), stage.loss_scale)
        optimiser = build_optimiser(stage, parameters)
        decoder = pair.student.model
        # No step is measured here: `auto` takes the least memory.
        decoder.checkpoint_layers(stage.checkpointing is not False)
        for batches in self._loader.steps(0, stage.steps):
            seed_everything(step_seed(self._seed, "layer selection", batches.step))
            units = sum(
                (objective.count_units(pair, micro) for micro in batches.micro_batches),
                torch.zeros(len(objective.terms), dtype=torch.float64),
            )
            if not bool(units.any()):
                continue
            pair.student.train()
            weights = objective.term_weights(units)
            for micro in batches.micro_batches:
                objective.loss_sums(pair, micro.to(pair.device), weights)
            norm = float(clip_gradients(parameters, stage.optimiser.clip))
            if not math.isfinite(norm):
                raise MmmambaError(
                    f"the gradient norm is {norm} at step {batches.step + 1} of a training for "
                    "--select kl",
                    f"lower stages.{stage.name}.lr with --set",
                )
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(stage, batches.step)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decoder.checkpoint_layers(False)


@contextmanager
def _restored(
    student: nn.ModuleList, teacher: nn.ModuleList, layers: Collection[int]
) -> Iterator[None]:
    """The teacher's mixers in `layers` of the student, and the student's own again after."""
    before = {layer: student[layer].mixer for layer in layers}
    try:
        for layer in layers:
            student[layer].mixer = teacher[layer].mixer
        yield
    finally:
        for layer, mixer in before.items():
            student[layer].mixer = mixer


def _without_layers(
    parameters: Mapping[str, nn.Parameter], layers: Collection[int]
) -> dict[str, nn.Parameter]:
    """The parameters without those of the mixers that are replaced in `layers`."""
    prefixes = tuple(f"model.layers.{layer}.mixer." for layer in layers)
    return {name: p for name, p in parameters.items() if not name.startswith(prefixes)}
