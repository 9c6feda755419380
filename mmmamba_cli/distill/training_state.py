"""Training states on disk, and the settings they were made with.

A state is a folder `step-NNNNNNNN` of torch.distributed.checkpoint files (master weights and AdamW
moments by parameter name) with `state.json` (progress and settings). States are written atomically
and can be read by any number of processes. A state is resumed only if the settings that affect the
result are the same.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import nn

from mmmamba_cli.checkpoint import atomic_folder
from mmmamba_cli.data import fingerprint, open_corpus
from mmmamba_cli.distill.training_state_reader import (
    DAMAGE_ERRORS,
    HINT,
    StateReader,
    damaged_state,
)
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import DataError, MmmambaWarning, RecipeError, RunError
from mmmamba_cli.recipe import Data, Recipe, Stage, parse_recipe, stage_data
from mmmamba_cli.runs import Manifest

STATE_FILE = "state.json"
STEP_FOLDER = re.compile(r"step-(\d{8})")
BEST = "best"
STATE_FOLDER = re.compile(rf"(step|{BEST})-\d{{8}}")
# Settings that change how a stage is computed or logged, but not its result.
SETTINGS_WITHOUT_EFFECT = (
    "stage.accumulation",
    "stage.checkpointing",
    "stage.evaluate_every",
    "stage.save_every",
    "data.held_out",
    "data.workers",
    "data.max_bad_share",
    "digests.held_out",
)
# Ignored if the digests of the data are known.
DATA_PATH_SETTINGS = ("data.train", "data.image_root", "stage.train")

Digests = dict[str, dict[str, str]]


@with_config(ConfigDict(extra="forbid"))
@dataclass
class Progress:
    """Progress of a stage; `step` counts the steps done."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    # The last held-out metrics, with their step.
    held_out: dict[str, Any] = field(default_factory=dict)
    # The decision of `checkpointing: auto`; None for other settings.
    recomputation: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """All fields; `recomputation` only if there is a decision."""
        fields = asdict(self)
        if self.recomputation is None:
            del fields["recomputation"]
        return fields


@dataclass(frozen=True)
class StateRecord:
    """Contents of `state.json`; `written` is its time, in the format of a manifest's `created`."""

    progress: Progress
    settings: dict[str, Any]
    written: str


class StateFolder:
    """The folder with the training states of one stage."""

    def __init__(self, folder: Path, world: World):
        self.folder = folder
        self.world = world

    def steps(self) -> list[int]:
        """Steps of the complete states, in ascending order."""
        if not self.folder.is_dir():
            return []
        found = [
            STEP_FOLDER.fullmatch(p.name)
            for p in self.folder.iterdir()
            if (p / STATE_FILE).is_file()
        ]
        return sorted(int(match[1]) for match in found if match)

    def incomplete(self) -> list[str]:
        """Names of the folders that a crash left incomplete; they are never read."""
        if not self.folder.is_dir():
            return []
        return sorted(
            p.name
            for p in self.folder.iterdir()
            if p.is_dir() and (p.name.startswith(".") or not (p / STATE_FILE).is_file())
        )

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer | None,
        record: Mapping[str, Any],
    ) -> None:
        """Write a state as `name`, replacing an existing one. Call it on all processes."""
        with (
            self._atomic_folder_of_all(self.folder / name) as partial,
            _ignore_single_process_warning(),
        ):
            dcp.save(
                _state_dict(parameters, optimiser),
                checkpoint_id=str(partial),
                no_dist=self.world.size == 1,
            )
            if self.world.is_main:
                text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
                (partial / STATE_FILE).write_text(text, encoding="utf-8")

    def read_record(self, name: str) -> StateRecord:
        """Read `state.json`. Raises `RunError` if it is damaged."""
        file = self.folder / name / STATE_FILE
        try:
            value = json.loads(file.read_text(encoding="utf-8-sig"))
            # Reject lone surrogates (`\ud800`): they cannot be encoded as UTF-8.
            json.dumps(value, ensure_ascii=False).encode()
            progress = TypeAdapter(Progress).validate_python(value["progress"])
            settings = value["settings"]
            if progress.step != int(name[-8:]) or not _is_settings(settings):
                raise ValueError("of another step or stage")
            written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise RunError(
                f"{file} is damaged: it does not say how far the stage had come", HINT
            ) from error
        return StateRecord(progress, settings, written.isoformat(timespec="microseconds"))

    def load(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer | None,
    ) -> None:
        """Read a state into parameters and optimiser, running no code from it.

        Raises:
            RunError: the state is damaged, has other tensors, or contains code.
        """
        tensors, folder = _state_dict(parameters, optimiser), self.folder / name
        reader = StateReader(folder, dict(_shapes(tensors)))
        try:
            with _ignore_single_process_warning():
                dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        except dcp.CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if not isinstance(cause, DAMAGE_ERRORS):
                    raise cause from error
            raise damaged_state(folder) from error
        except DAMAGE_ERRORS as error:
            raise damaged_state(folder) from error

    def best_name(self, step: int) -> str:
        """Folder name of the weights of `step`, where the held-out loss was lowest so far."""
        return f"{BEST}-{step:08d}"

    def prune(self, newest: int, best_step: int | None) -> None:
        """Remove all states except the newest and the best one of its record.

        Call it after saving the newest state: a killed run resumes from a state and needs the best
        one of that state's record.
        """
        if not self.world.is_main:
            return
        kept = {self.path(newest).name, None if best_step is None else self.best_name(best_step)}
        for folder in self.folder.iterdir():
            if STATE_FOLDER.fullmatch(folder.name) and folder.name not in kept:
                shutil.rmtree(folder)

    def clear(self) -> None:
        """Remove the folder; its name is free at once."""
        if not self.world.is_main:
            return
        gone = self.folder.parent / f".{self.folder.name}.removed"
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _atomic_folder_of_all(self, target: Path) -> Iterator[Path]:
        """An atomic folder that all processes write into and process 0 renames into place."""
        if self.world.size == 1:
            with atomic_folder(target, overwrite=True) as partial:
                yield partial
            return
        if self.world.is_main:
            with atomic_folder(target, overwrite=True) as partial:
                self.world.run_on_main(lambda: str(partial))
                yield partial
                self.world.barrier()
        else:
            yield Path(self.world.run_on_main(str))
            self.world.barrier()
        self.world.barrier()


def state_record(progress: Progress, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of `state.json`: progress and settings."""
    return {"format": 1, "progress": progress.as_dict(), "settings": dict(settings)}


def _is_settings(value: Any) -> bool:
    """Whether the value has the sections that `diff_settings` compares."""
    return isinstance(value, dict) and all(
        isinstance(value.get(section), dict) for section in ("stage", "data")
    )


def _shapes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names as torch.distributed.checkpoint flattens them, with shapes."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _shapes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuple(value.shape)


@contextmanager
def _ignore_single_process_warning() -> Iterator[None]:
    """Ignore the warning that torch.distributed is disabled, given for a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state_dict(
    parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer | None
) -> dict[str, Any]:
    tensors: dict[str, Any] = {"master": {n: p.detach() for n, p in parameters.items()}}
    if optimiser is not None:
        tensors["adamw"] = {n: optimiser.state[p] for n, p in parameters.items()}
    return tensors


def stage_settings(
    recipe: Recipe, stage: Stage, parent: Manifest, digests: Digests | None = None
) -> dict[str, Any]:
    """All settings that the result of a stage depends on, as JSON; no `digests` if unknown."""
    settings: dict[str, Any] = {
        "stage": stage.model_dump(mode="json"),
        "data": stage_data(recipe.data, stage).model_dump(mode="json"),
        "seed": recipe.seed,
        "parent": parent.content_hash,
    }
    return settings | ({"digests": digests} if digests else {})


def product_settings(product: Manifest, stage: Stage, parent: Manifest) -> dict[str, Any] | None:
    """Settings that a finished stage was made with; None if its recipe lacks them."""
    try:
        recipe = parse_recipe(product.recipe, f"recipe of {product.name}")
    except RecipeError:
        return None
    made = next((made for made in recipe.stages if made.name == stage.name), None)
    return None if made is None else stage_settings(recipe, made, parent, product.data)


def stage_digests(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, Digests | None]:
    """`data_digests` of each stage by its name; stages of the same data share one reading."""
    found: dict[str | None, Digests | None] = {}
    for stage in stages:
        data = stage_data(recipe.data, stage)
        if data.train not in found:
            found[data.train] = data_digests(data)
    return {stage.name: found[stage_data(recipe.data, stage).train] for stage in stages}


def data_digests(data: Data) -> Digests | None:
    """Digests of the data sets `train` and `held_out`; None if one cannot be opened."""
    root = None if data.image_root is None else Path(data.image_root)
    sources = {"train": data.train, "held_out": data.held_out}
    # Training opens the data again and reports its problems; a finished stage needs no data.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MmmambaWarning)
        try:
            return {
                name: fingerprint(open_corpus(source, root)).as_dict()
                for name, source in sources.items()
                if source is not None
            }
        except DataError:
            return None


def diff_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the settings of a state or product and the current ones.

    Data sets are compared by digest if both sides have one, else by path.
    """
    before, after = _flatten(_with_defaults(saved)), _flatten(now)
    left_out: tuple[str, ...] = SETTINGS_WITHOUT_EFFECT
    if "digests" not in saved or "digests" not in now:
        left_out += ("digests.",)
    else:
        left_out += DATA_PATH_SETTINGS
    return [
        _describe_change(key, before.get(key), after.get(key), now)
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(left_out)
    ]


def same_held_out(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether both have the same held-out samples, so that their losses are comparable."""
    digests = [settings.get("digests", {}).get("held_out") for settings in (saved, now)]
    if None not in digests:
        return digests[0] == digests[1]
    return saved["data"].get("held_out") == now["data"].get("held_out")


def result_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect the result, flattened; equal settings give the same bits."""
    left_out = SETTINGS_WITHOUT_EFFECT + (DATA_PATH_SETTINGS if "digests" in settings else ())
    return {key: value for key, value in _flatten(settings).items() if not key.startswith(left_out)}


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of an older version, with defaults for fields it did not have."""
    try:
        stage, data = Stage.model_validate(saved["stage"]), Data.model_validate(saved["data"])
    except (KeyError, ValidationError):
        return saved
    return {**saved, "stage": stage.model_dump(mode="json"), "data": data.model_dump(mode="json")}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _describe_change(key: str, before: Any, after: Any, settings: Mapping[str, Any]) -> str:
    """The change as a user would set it: `stages.stage1.lr: 0.1 -> 0.2` for `stage.lr`."""
    section, _, rest = key.partition(".")
    if section == "digests":
        what = rest.partition(".")[2]
        return f"{what} of data.train ({settings['data']['train']}) have changed"
    if section == "parent":
        return f"the product it starts from: {str(before)[:12]} -> {str(after)[:12]}"
    name = f"stages.{settings['stage']['name']}.{rest}" if section == "stage" else key
    return f"{name}: {before} -> {after}"
