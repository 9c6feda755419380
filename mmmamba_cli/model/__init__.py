"""The model; importing this package registers it with transformers' Auto classes."""
# ruff: noqa: E402 -- versions are checked first: other releases lack names imported below.

from mmmamba_cli.versions import require_versions

require_versions()

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from mmmamba_cli.architecture import (
    ATTENTION,
    LINEAR,
    MixerConfig,
    StackConfig,
    VisionConfig,
)
from mmmamba_cli.model.cache import HybridCache, new_cache
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.modeling import HolisticDecoder, HolisticVLM
from mmmamba_cli.processing import register_processing
from mmmamba_cli.teachers.config_class import register_students

AutoConfig.register(HolisticVLMConfig.model_type, HolisticVLMConfig, exist_ok=True)
AutoModel.register(HolisticVLMConfig, HolisticDecoder, exist_ok=True)
AutoModelForImageTextToText.register(HolisticVLMConfig, HolisticVLM, exist_ok=True)
AutoModelForCausalLM.register(HolisticVLMConfig, HolisticVLM, exist_ok=True)
register_processing(HolisticVLMConfig)
register_students()

__all__ = [
    "ATTENTION",
    "LINEAR",
    "HolisticDecoder",
    "HolisticVLM",
    "HolisticVLMConfig",
    "HybridCache",
    "MixerConfig",
    "StackConfig",
    "VisionConfig",
    "new_cache",
]
