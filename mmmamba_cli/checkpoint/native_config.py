"""The native `config.json`: validation, and conversion to transformers' config class.

Fields of the stacks, vision and mixer sections are validated by the model's dataclasses. Fields of
transformers itself are left to transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from mmmamba_cli.architecture import (
    LAYER_TYPES,
    Architecture,
    MixerConfig,
    StackConfig,
    VisionConfig,
    derived_fields,
    mixers_problem,
    options_problem,
    tile_options_problem,
)
from mmmamba_cli.checkpoint.config_fields import (
    MAX_LAYERS,
    check_rope_scaling,
    field_path,
    positive_float,
    positive_int,
    token_ids,
)
from mmmamba_cli.errors import CheckpointError, MmmambaWarning

if TYPE_CHECKING:
    from mmmamba_cli.model import HolisticVLMConfig

SECTIONS = {
    "language_stack": StackConfig,
    "embedding_stack": StackConfig,
    "vision": VisionConfig,
    "mixer": MixerConfig,
}
HINT = "take the config.json that was written with the weights"
MODEL_TYPE = "mmmamba"
# Fields that an export adds: the bundled code, and the distillation stages done.
EXPORTED_FIELDS = ("auto_map", "mmmamba")
# Exceptions of transformers for invalid values of its own fields, for example a dtype.
_CONFIG_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def to_architecture(raw: Mapping[str, Any], where: str) -> Architecture:
    """The architecture in a config that mmmamba wrote.

    Raises `CheckpointError` that names the first wrong field.
    """
    for key in ("vocab_size", "hidden_size"):
        positive_int(raw, key, where)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_ids(raw, key, where)
    for name, kind in SECTIONS.items():
        section = raw.get(name)
        if section is None and name != "language_stack":
            continue
        if not isinstance(section, dict):
            raise CheckpointError(f"{where}: {name} is {section!r:.60}, expected a table", HINT)
        _check_section(section, kind, where, name)
    _check_layers(raw, where)
    _check_mixers(raw, where)
    known = {field.name for field in fields(Architecture)}
    found = Architecture(
        **{key: value for key, value in raw.items() if key in known and value is not None}
    )
    problem = tile_options_problem(found)
    if problem is not None:
        raise CheckpointError(f"{where}: {problem}", HINT)
    for key, value in derived_fields(found).items():
        if key in raw and raw[key] != value:
            raise CheckpointError(
                f"{where}: {key} is {raw[key]!r:.60}, but its stacks give {value}", HINT
            )
    return found


def warn_outdated_code(raw: Mapping[str, Any], where: str) -> None:
    """Warn of a hub export whose bundled code does not run on transformers 5.24 and newer.

    transformers 5.24 renamed an argument of every model. The code that accepts both names was
    introduced together with the `auto_map` entry `AutoModel`.
    """
    classes = raw.get("auto_map")
    if isinstance(classes, Mapping) and "AutoConfig" in classes and "AutoModel" not in classes:
        warnings.warn(
            MmmambaWarning(
                f"{where}: the code in this export does not run on transformers 5.24 and newer; "
                "its weights are read here all the same. Export the model again with this release"
            ),
            stacklevel=2,
        )


def _check_section(section: Mapping[str, Any], kind: type, where: str, name: str) -> None:
    """Validate a section against the dataclass `kind`: field names and annotated types."""
    known = {field.name: field for field in fields(kind)}
    strange = [key for key in section if key not in known]
    if strange:
        raise CheckpointError(
            f"{field_path(where, name, f'{strange[0]:.60}')} is not known, known are "
            f"{', '.join(known)}",
            HINT,
        )
    for key, field in known.items():
        if key not in section and field.default is not MISSING:
            continue
        value = section.get(key)
        if key not in section:
            raise CheckpointError(f"{field_path(where, name, key)} is missing", HINT)
        # `options_problem` knows the ranges of the mixers' options.
        if kind is MixerConfig:
            continue
        if field.type == "int":
            positive_int(section, key, where, name)
        elif field.type == "float":
            positive_float(section, key, None, where, name)
        elif field.type == "bool" and not isinstance(value, bool):
            raise CheckpointError(
                f"{field_path(where, name, key)} is {value!r:.60}, expected true or false", HINT
            )


def _check_layers(raw: Mapping[str, Any], where: str) -> None:
    """Validate fields against each other: layers and their types, heads, patches."""
    stacks = [raw[name] for name in ("embedding_stack", "language_stack") if raw.get(name)]
    layers = sum(stack["num_layers"] for stack in stacks)
    kinds = raw.get("layer_types")
    if layers > MAX_LAYERS or not isinstance(kinds, list) or len(kinds) != layers:
        found = f"{len(kinds)} entries" if isinstance(kinds, list) else f"{kinds!r:.60}"
        raise CheckpointError(
            f"{where}: layer_types has {found}, the stacks have {layers} layers", HINT
        )
    for index, kind in enumerate(kinds):
        if kind not in LAYER_TYPES:
            known = ", ".join(LAYER_TYPES)
            raise CheckpointError(
                f"{where}: layer_types[{index}] is {kind!r:.60}, known are {known}", HINT
            )
    for stack in stacks:
        scaling = stack.get("rope_scaling")
        if stack["num_heads"] % stack["num_kv_heads"] or stack["head_dim"] % 2:
            raise CheckpointError(
                f"{where}: a stack has {stack['num_heads']} heads of {stack['head_dim']} for "
                f"{stack['num_kv_heads']} key-value heads, expected whole groups of even heads",
                HINT,
            )
        check_rope_scaling(scaling, where)
    for key in ("normalize_embedding_output", "tie_word_embeddings"):
        if not isinstance(raw.get(key, False), bool):
            raise CheckpointError(
                f"{where}: {key} is {raw[key]!r:.60}, expected true or false", HINT
            )
    if raw.get("vision") is not None:
        _check_vision(raw["vision"], where)


def _check_mixers(raw: Mapping[str, Any], where: str) -> None:
    """Validate the mixer of each layer and the mixers' options."""
    mixers = raw.get("mixers")
    if mixers is not None and not (
        isinstance(mixers, list) and all(isinstance(name, str) for name in mixers)
    ):
        raise CheckpointError(f"{where}: mixers is {mixers!r:.60}, expected a list of names", HINT)
    options = MixerConfig(**(raw.get("mixer") or {}))
    problem = options_problem(options) or mixers_problem(raw["layer_types"], mixers, options)
    if problem is not None:
        raise CheckpointError(f"{where}: {problem}", HINT)


def _check_vision(vision: Mapping[str, Any], where: str) -> None:
    image, patch, ratio = (vision[k] for k in ("image_size", "patch_size", "downsample_ratio"))
    merge = round(1 / ratio) if ratio * image >= 1 else 0
    if merge < 1 or image % (patch * merge) or vision["pixel_shuffle"] not in ("pre", "post"):
        raise CheckpointError(
            f"{where}: vision has image_size {image}, patch_size {patch}, downsample_ratio {ratio} "
            f"and pixel_shuffle {vision['pixel_shuffle']!r:.60}, which give no whole patches",
            HINT,
        )


def to_model_config(architecture: Architecture) -> HolisticVLMConfig:
    """transformers' config of a model with this architecture."""
    from mmmamba_cli.model import HolisticVLMConfig

    return HolisticVLMConfig(**architecture.values, architectures=["HolisticVLM"])


def native_model_config(raw: Mapping[str, Any], where: str) -> HolisticVLMConfig:
    """transformers' config from a native config that `to_architecture` has validated.

    Raises `CheckpointError` for fields that transformers refuses.
    """
    from huggingface_hub.errors import StrictDataclassError

    from mmmamba_cli.model import HolisticVLMConfig

    try:
        # The code bundled with an export is this package's own: its references are dropped.
        known = {k: v for k, v in raw.items() if k not in EXPORTED_FIELDS}
        return HolisticVLMConfig.from_dict(known)
    except (*_CONFIG_ERRORS, StrictDataclassError) as error:
        raise CheckpointError(
            f"{where} has fields that transformers cannot read as a model's config", HINT
        ) from error
