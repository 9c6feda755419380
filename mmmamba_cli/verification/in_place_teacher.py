"""A teacher of transformers: its folder and configs, and how its models are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from mmmamba_cli.checkpoint import open_source
from mmmamba_cli.devices import require_memory
from mmmamba_cli.errors import CheckpointError, MmmambaError
from mmmamba_cli.processing.quiet_loading import quiet_loading
from mmmamba_cli.teachers import anatomy_of, text_config
from mmmamba_cli.teachers.anatomy import teacher_class
from mmmamba_cli.verification.processor_checks import IMAGE_TOKEN_FIELDS
from mmmamba_cli.verification.report import OK, CheckResult
from mmmamba_cli.verification.stored_tensors import num_elements

ANATOMY = "anatomy"


@dataclass(frozen=True)
class InPlaceTeacher:
    """A teacher's folder, its configs, and where and how its models run."""

    folder: Path
    config: Any
    generation_config: Any
    device: torch.device
    dtype: torch.dtype
    tokens: int

    @property
    def takes_pictures(self) -> bool:
        return getattr(self.config, "vision_config", None) is not None

    @property
    def vocab_size(self) -> int:
        return int(text_config(self.config).vocab_size)

    @property
    def num_layers(self) -> int:
        return int(text_config(self.config).num_hidden_layers)

    @property
    def placeholder_ids(self) -> list[int]:
        """Ids of images and videos in prompts, which an answer must not contain."""
        names = (*IMAGE_TOKEN_FIELDS, "video_token_id", "video_token_index")
        found = (getattr(self.config, name, None) for name in names)
        return sorted({one for one in found if isinstance(one, int)})

    @property
    def special_ids(self) -> list[int]:
        """Ids that prompts of random ids avoid: placeholders, and those of begin, end, padding."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        sources = (self.config, text_config(self.config))
        given = [getattr(one, name, None) for one in sources for name in names]
        listed = [one if isinstance(one, list) else [one] for one in given]
        vision = ("vision_start_token_id", "vision_end_token_id", "boi_token_index")
        listed.append([getattr(self.config, name, None) for name in vision])
        return sorted({i for ids in listed for i in ids if i is not None} | {*self.placeholder_ids})

    @property
    def stock_class(self) -> Any:
        return teacher_class(type(self.config))

    def load(self, model_class: Any, config: Any) -> tuple[Any, dict[str, Any]]:
        """A model of the files in eval mode, and what transformers says of its tensors.

        Raises:
            OutOfMemory: the weights do not fit.
        """
        with open_source(self.folder) as source:
            nbytes = num_elements(source) * self.dtype.itemsize
        require_memory(self.device, nbytes, f"a model in {self.dtype}".replace("torch.", ""))
        with quiet_loading():
            model, info = model_class.from_pretrained(
                self.folder, config=config, dtype=self.dtype, output_loading_info=True
            )
        return model.to(self.device).requires_grad_(False).eval(), info


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """generation_config.json of a folder; None if there is none."""
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(folder)


def read_config(folder: Path, model_type: str) -> Any:
    """The config of a folder, as transformers reads it.

    Raises:
        CheckpointError: transformers does not know the model_type, or refuses a field.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # The configs of families check their fields, with exceptions of any type.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read {folder / 'config.json'}, whose "
            f"model_type is {model_type}: {first}",
            "take a checkpoint that transformers loads without code of its own, or update "
            "transformers if the family is newer than it",
        ) from error


def check_anatomy(config: Any) -> CheckResult:
    """What can be converted, and by which mixers. A teacher that cannot be is a difference."""
    found = anatomy_of(config)
    view = found.attention[0]
    norms = f", {' and '.join(view.qk_norms)}" if view.qk_norms else ""
    detail = (
        f"{found.num_layers} text layers at {found.layers_path}, {view.num_heads} query and "
        f"{view.num_kv_heads} key/value heads of {view.head_dim}{norms}"
    )
    if found.rope_problem is not None:
        detail += f"; no mixer with RoPE: {found.rope_problem}"
    return CheckResult(ANATOMY, OK, detail)


def implementation(teacher: InPlaceTeacher) -> str:
    """The stock class and its version."""
    try:
        name = teacher.stock_class.__name__
    except MmmambaError:
        return f"transformers {transformers.__version__}"
    return f"{name} of transformers {transformers.__version__}"


def anatomy_warnings(config: Any) -> tuple[str, ...]:
    """What a student of this teacher cannot follow."""
    try:
        found = anatomy_of(config)
    except MmmambaError:
        return ()
    return () if found.warning is None else (found.warning,)
