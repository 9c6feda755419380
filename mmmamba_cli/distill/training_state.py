"""Training states on disk: complete or not there, readable by any number of processes.

A state is a folder `step-NNNNNNNN` of torch.distributed.checkpoint files (master weights and
AdamW's moments by parameter name) with `state.json`, which says how far the stage had come.

The settings that a stage's result depends on, and how two sets of them differ.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
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
from mmmamba_cli.distill.training_state_reader import DAMAGE, HINT, StateReader, damaged
from mmmamba_cli.distributed import World
from mmmamba_cli.errors import DataError, MmmambaWarning, RecipeError, RunError
from mmmamba_cli.recipe import Data, Recipe, Stage, parse_recipe
from mmmamba_cli.runs import Manifest

STATE = "state.json"
FOLDER = re.compile(r"step-(\d{8})")
BEST = "best"
STATES = re.compile(rf"(step|{BEST})-\d{{8}}")


@with_config(ConfigDict(extra="forbid"))
@dataclass
class Progress:
    """How far a stage has come; `step` is the number of steps done."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    # The last held-out numbers and their step.
    held_out: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StateRecord:
    """The contents of `state.json`; `written` is when it was, as a manifest's `created`."""

    progress: Progress
    settings: dict[str, Any]
    written: str


class StateFolder:
    """Where the training states of one stage lie."""

    def __init__(self, folder: Path, world: World):
        self.folder = folder
        self.world = world

    def steps(self) -> list[int]:
        """Steps of the complete states, ascending."""
        if not self.folder.is_dir():
            return []
        found = [FOLDER.fullmatch(p.name) for p in self.folder.iterdir() if (p / STATE).is_file()]
        return sorted(int(match[1]) for match in found if match)

    def half_written(self) -> list[str]:
        """Names of folders that a crash left incomplete; they are never read."""
        if not self.folder.is_dir():
            return []
        return sorted(
            p.name
            for p in self.folder.iterdir()
            if p.is_dir() and (p.name.startswith(".") or not (p / STATE).is_file())
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
        """Write one state under `name`, all processes together; an old one of that name goes."""
        with self._writing(self.folder / name) as partial, _without_advice():
            dcp.save(
                _tensors(parameters, optimiser),
                checkpoint_id=str(partial),
                no_dist=self.world.size == 1,
            )
            if self.world.is_main:
                text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
                (partial / STATE).write_text(text, encoding="utf-8")

    def record(self, name: str) -> StateRecord:
        """The contents of `state.json`. Raises `RunError` if it is damaged."""
        file = self.folder / name / STATE
        try:
            value = json.loads(file.read_text(encoding="utf-8-sig"))
            # Half of a surrogate pair cannot be written again as UTF-8.
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
        """Read a state into parameters and optimiser; nothing in it is run.

        Raises `RunError` if it is damaged, of other tensors, or would run code.
        """
        tensors, folder = _tensors(parameters, optimiser), self.folder / name
        reader = StateReader(folder, dict(_shapes(tensors)))
        try:
            with _without_advice():
                dcp.load(tensors, storage_reader=reader, no_dist=self.world.size == 1)
        except dcp.CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if not isinstance(cause, DAMAGE):
                    raise cause from error
            raise damaged(folder) from error
        except DAMAGE as error:
            raise damaged(folder) from error

    def best(self, step: int) -> str:
        """The name of the weights of `step`, where the held-out loss was lowest so far."""
        return f"{BEST}-{step:08d}"

    def drop_others(self, newest: int, best_step: int | None) -> None:
        """Remove all states but the newest and the best that it knows of.

        Only now: a run that is killed goes on from a state whose best must still be there.
        """
        if not self.world.is_main:
            return
        kept = {self.path(newest).name, None if best_step is None else self.best(best_step)}
        for folder in self.folder.iterdir():
            if STATES.fullmatch(folder.name) and folder.name not in kept:
                shutil.rmtree(folder)

    def clear(self) -> None:
        """Remove the whole folder, under its name at once."""
        if not self.world.is_main:
            return
        gone = self.folder.parent / f".{self.folder.name}.removed"
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(FileNotFoundError):
            self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def _writing(self, target: Path) -> Iterator[Path]:
        """An atomic folder that all processes write into; process 0 puts it in place."""
        if self.world.size == 1:
            with atomic_folder(target, overwrite=True) as partial:
                yield partial
            return
        if self.world.is_main:
            with atomic_folder(target, overwrite=True) as partial:
                self.world.on_main(lambda: str(partial))
                yield partial
                self.world.wait()
        else:
            yield Path(self.world.on_main(str))
            self.world.wait()
        self.world.wait()


def state_record(progress: Progress, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `state.json` holds: how far, and under which settings."""
    return {"format": 1, "progress": asdict(progress), "settings": dict(settings)}


def _is_settings(value: Any) -> bool:
    """Whether this has the fields that are compared with today's settings."""
    return isinstance(value, dict) and all(
        isinstance(value.get(section), dict) for section in ("stage", "data")
    )


def _shapes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of tensors as torch.distributed.checkpoint flattens them, with their shapes."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _shapes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", tuple(value.shape)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Quiet about what a single process is told each time: that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _tensors(
    parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer | None
) -> dict[str, Any]:
    tensors: dict[str, Any] = {"master": {n: p.detach() for n, p in parameters.items()}}
    if optimiser is not None:
        tensors["adamw"] = {n: optimiser.state[p] for n, p in parameters.items()}
    return tensors


# Settings that change how a stage is computed or watched, and not what it learns.
HARMLESS = (
    "stage.accumulation",
    "stage.checkpointing",
    "stage.evaluate_every",
    "stage.save_every",
    "data.held_out",
    "data.workers",
    "data.max_bad_share",
    "digests.held_out",
)
# Where data lies says nothing once its digest is known.
PLACES = ("data.train", "data.image_root")

Digests = dict[str, dict[str, str]]


def settings_of(
    recipe: Recipe, stage: Stage, parent: Manifest, digests: Digests | None = None
) -> dict[str, Any]:
    """Everything a stage's result depends on, as plain JSON; without `digests` where unknown."""
    settings: dict[str, Any] = {
        "stage": stage.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "seed": recipe.seed,
        "parent": parent.content_hash,
    }
    return settings | ({"digests": digests} if digests else {})


def product_settings(product: Manifest, stage: Stage, parent: Manifest) -> dict[str, Any] | None:
    """The settings a finished stage was made with; None where its recipe does not say them."""
    try:
        recipe = parse_recipe(product.recipe, f"recipe of {product.name}")
    except RecipeError:
        return None
    made = next((made for made in recipe.stages if made.name == stage.name), None)
    return None if made is None else settings_of(recipe, made, parent, product.data)


def data_digests(data: Data) -> Digests | None:
    """Digests of the recipe's data by `train` and `held_out`; None if it cannot be opened."""
    root = None if data.image_root is None else Path(data.image_root)
    sources = {"train": data.train, "held_out": data.held_out}
    # Training opens the data itself and says what is wrong with it; a finished stage needs none.
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


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a state or product and those of today, as text.

    Data is compared by digest where both sides have one, else by its path.
    """
    before, after = _flat(_with_defaults(saved)), _flat(now)
    left_out: tuple[str, ...] = HARMLESS
    if "digests" not in saved or "digests" not in now:
        left_out += ("digests.",)
    else:
        left_out += PLACES
    return [
        _described(key, before.get(key), after.get(key), now)
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(left_out)
    ]


def same_held_out(saved: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether held-out losses of both compare: they are of the same samples."""
    digests = [settings.get("digests", {}).get("held_out") for settings in (saved, now)]
    if None not in digests:
        return digests[0] == digests[1]
    return saved["data"].get("held_out") == now["data"].get("held_out")


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter for the result, flat; two equal ones give the same bits."""
    left_out = HARMLESS + (PLACES if "digests" in settings else ())
    return {key: value for key, value in _flat(settings).items() if not key.startswith(left_out)}


def _with_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of an older version with the defaults of fields that it did not have."""
    try:
        stage, data = Stage.model_validate(saved["stage"]), Data.model_validate(saved["data"])
    except (KeyError, ValidationError):
        return saved
    return {**saved, "stage": stage.model_dump(mode="json"), "data": data.model_dump(mode="json")}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _described(key: str, before: Any, after: Any, settings: Mapping[str, Any]) -> str:
    """The field as one would set it, `stages.stage1.lr: 0.1 -> 0.2` for `stage.lr`."""
    section, _, rest = key.partition(".")
    if section == "digests":
        what = rest.partition(".")[2]
        return f"{what} of data.train ({settings['data']['train']}) have changed"
    if section == "parent":
        return f"the product it starts from: {str(before)[:12]} -> {str(after)[:12]}"
    name = f"stages.{settings['stage']['name']}.{rest}" if section == "stage" else key
    return f"{name}: {before} -> {after}"
