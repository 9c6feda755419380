"""Base class of the transformers models: declarations and weight initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from mmmamba_cli.architecture import fp32_parameters, is_fp32_parameter
from mmmamba_cli.model.block import Block
from mmmamba_cli.model.config import HolisticVLMConfig
from mmmamba_cli.model.patch_embedding import VisionEmbedding


class HolisticPreTrainedModel(PreTrainedModel):
    """Declarations for transformers: module names, supported features, weight initialisation.

    transformers shares these between `AutoModel` and the model with a head by a base class.
    """

    config_class = HolisticVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _input_embed_layer = "text_embedding"
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    _supports_sdpa = True
    # Tensors of a teacher that the model does not use; checkpoints keep them for exports.
    _keys_to_ignore_on_load_unexpected = (r"^unused\.",)

    def post_init(self) -> None:
        """Extend transformers' method: keep small parameters in fp32 when loading."""
        parts = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = sorted(parts.intersection(fp32_parameters()))
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Block):
            module.mixer.reset_parameters()
        elif isinstance(module, VisionEmbedding):
            init.zeros_(module.position_embedding)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Implement `to`, `half` and `bfloat16`, keeping small parameters in fp32.

        transformers applies `_keep_in_fp32_modules_strict` in `from_pretrained` only.
        """
        parameters = [p for name, p in self.named_parameters() if is_fp32_parameter(name)]
        # Keyed by identity; the values keep the tensors alive, so that no id is reused.
        kept = {id(t): t for p in parameters for t in (p, p.grad) if t is not None}

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in kept and result.is_floating_point() and result.dtype.itemsize < 4:
                return tensor.to(result.device, torch.float32)
            return result

        return super()._apply(apply, recurse)
