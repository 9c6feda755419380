"""Models, samples and method of a measurement, loaded when the first layer is measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmmamba_cli.architecture import parameter_shapes
from mmmamba_cli.checkpoint import Checkpoint, parse_dtype
from mmmamba_cli.data import HELD_OUT, Accumulation, StepLoader, fingerprint, open_corpus
from mmmamba_cli.distill.micro_batches import stage_accumulation
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.distill.teacher_student import TeacherStudent, load_teacher_student
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.errors import DataError, RecipeError, RunError
from mmmamba_cli.layer_selection.kl_trained import TrainedRestoration
from mmmamba_cli.layer_selection.kl_zero import RestoredAttention
from mmmamba_cli.layer_selection.layer_scores import EMBEDDING, LANGUAGE
from mmmamba_cli.layer_selection.method import LayerMethod
from mmmamba_cli.layer_selection.mixer_error import MixerError
from mmmamba_cli.layer_selection.options import SelectionCallbacks, SelectionOptions
from mmmamba_cli.layer_selection.probe_samples import (
    ProbeSamples,
    build_loader,
    probe_batch_size,
    read_probe_samples,
)
from mmmamba_cli.layer_selection.recall import ReplacedAttention
from mmmamba_cli.recipe import KL, Recipe, Stage, stage_data
from mmmamba_cli.runs import Manifest, Run, open_processor
from mmmamba_cli.runs.manifest import package_versions

# The samples of a generated corpus that `kl` trains on; stages have streams of their own.
TRAINING_STREAM = "layer selection"
# What one unit of a score is, by method.
SCORE_UNITS = {
    "kl-zero": "fall of KL, nats per {scored} token",
    "kl": "fall of KL after training, nats per {scored} token",
    "recall": "fall of log-likelihood, nats per answer token",
    "mse": "squared error per element",
}


def score_unit(method: str, kl: KL) -> str:
    """The unit of a method's scores; of `file:PATH`, "score"."""
    return SCORE_UNITS.get(method, "score").replace("{scored} ", "answer " * (kl.mask == "answer"))


@dataclass(frozen=True)
class Measurement:
    """A method, a student and its teacher, and the data; nothing is loaded yet."""

    run: Run
    parent: Manifest
    recipe: Recipe
    options: SelectionOptions
    callbacks: SelectionCallbacks
    device: torch.device

    @property
    def scored_on(self) -> str:
        """The held-out conversations; for methods that train nothing, else the training data.

        Raises:
            DataError: there are no conversations of the kind.
        """
        data = self.recipe.data
        if data.held_out is None and self.options.method == "kl":
            raise DataError(
                "--select kl scores layers on held-out conversations, and there are none",
                "give --held-out FILE, or set data.held_out in the recipe",
            )
        source = data.held_out or stage_data(data, self.recipe.stages[-1]).train
        if source is None:
            raise DataError(
                f"--select {self.options.method} scores layers on conversations, and there are "
                "none",
                "give --held-out FILE or --data FILE",
            )
        return source

    @cached_property
    def stage(self) -> Stage:
        """The recipe's last end-to-end stage, shortened to the steps of the options.

        Raises `RecipeError` if it has none.
        """
        stages = [stage for stage in self.recipe.stages if stage.loss == "kl"]
        if not stages:
            raise RecipeError(
                "--select kl trains by a stage of the recipe with loss kl, and there is none",
                "use --select kl-zero, or add a stage with loss: kl to the recipe",
            )
        changes = {"steps": self.options.steps, "lora": None}
        return stages[-1].model_copy(update=changes)

    @property
    def kl(self) -> KL:
        """The divergence of the recipe's last end-to-end stage, which says what it scores.

        A recipe without such a stage, as that of shared stages of `ablate`, scores the answers: the
        labels of the data say which columns count.
        """
        stages = [stage for stage in self.recipe.stages if stage.loss == "kl"]
        return (stages[-1].kl or KL()) if stages else KL(mask="answer")

    def inputs(self) -> dict[str, Any]:
        """All that the scores depend on, as JSON. Raises `DataError` if the data are missing."""
        data, options = self.recipe.data, self.options
        found: dict[str, Any] = {
            "method": options.method,
            "student": self.parent.content_hash,
            "teacher": self.run.teacher.content_hash,
            "scored on": self._digest(self.scored_on),
            "samples": options.samples,
            "seed": options.seed,
            "max_length": self._max_length,
            "max_tiles": data.max_tiles,
            "precision": self.precision,
            "columns": self.kl.mask,
            "device": self.device.type,
            "versions": package_versions(),
        }
        if options.method == "kl":
            found["trained on"] = self._digest(self._trained_on)
            found["stage"] = self.stage.model_dump(mode="json")
        return found

    @property
    def precision(self) -> str:
        return self.recipe.stages[-1].precision

    def stacks(self) -> list[str]:
        """The stack of each layer."""
        config = self.run.open_product(self.parent.name).architecture
        first = config.num_embedding_layers
        return [EMBEDDING if i < first else LANGUAGE for i in range(config.num_hidden_layers)]

    def method(self, kept: Collection[int]) -> LayerMethod:
        """The method for layers beside `kept`, which have the teacher's attention already."""
        options, probe = self.options, self.probe
        if options.method == "mse":
            return MixerError(probe)
        if options.method == "recall":
            return ReplacedAttention(probe)
        if options.method == "kl-zero":
            return RestoredAttention(probe, kept)
        stage = self.stage
        loader = self._loader(
            self._trained_on, stage.batch_size, TRAINING_STREAM, stage_accumulation(stage)
        )
        return TrainedRestoration(probe, kept, self.stage, loader, options.seed)

    @cached_property
    def probe(self) -> ProbeSamples:
        """Both models and the samples. Raises what loading and reading them raises."""
        run, options = self.run, self.options
        teacher, student = run.open_teacher(options.teacher), run.open_product(self.parent.name)
        size = probe_batch_size(options.samples)
        loader = self._loader(self.scored_on, size, HELD_OUT, single_pass=True)
        self.callbacks.say(f"checking teacher and {self.parent.name} against their hashes")
        run.verify_teacher(teacher)
        run.verify_product(self.parent.name)
        pair = self._load_pair(teacher, student)
        return read_probe_samples(loader, pair, self.kl, options.samples, self.callbacks.say)

    def _load_pair(self, teacher: Checkpoint, student: Checkpoint) -> TeacherStudent:
        self.callbacks.say("loading teacher and student")
        trainable: Sequence[str] = ()
        if self.options.method == "kl":
            names = parameter_shapes(student.config)
            trainable = trainable_names(self.stage, student.config, names)
        placement = PairPlacement(parse_dtype(self.parent.dtype), self.precision, self.device)
        return load_teacher_student(teacher, student, trainable, placement)

    def _loader(
        self,
        source: str,
        batch_size: int,
        stream: str,
        accumulation: Accumulation = 1,
        single_pass: bool = False,
    ) -> StepLoader:
        student = self.run.open_product(self.parent.name)
        processor = open_processor(student)
        if processor is None:
            raise RunError(
                f"{student.path} has no tokenizer, so conversations cannot be read",
                "seed again with --tokenizer FILE",
            )
        return build_loader(
            source,
            self.recipe.data,
            processor,
            batch_size=batch_size,
            accumulation=accumulation,
            max_length=self._max_length,
            stream=stream,
            seed=self.options.seed,
            single_pass=single_pass,
        )

    @property
    def _max_length(self) -> int:
        stage = self.stage if self.options.method == "kl" else self.recipe.stages[-1]
        return stage.max_length or self.recipe.data.max_length

    @property
    def _trained_on(self) -> str:
        train = stage_data(self.recipe.data, self.stage).train
        if train is None:
            raise DataError(
                "--select kl trains on conversations, and there are none",
                "give --data FILE, or set data.train in the recipe",
            )
        return train

    def _digest(self, source: str) -> dict[str, str]:
        data, seed = self.recipe.data, self.options.seed
        root = None if data.image_root is None else Path(data.image_root)
        return fingerprint(open_corpus(source, root, seed=seed, stream=HELD_OUT)).as_dict()
