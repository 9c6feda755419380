"""transformers' common model and generation tests against `HolisticVLM`, in six variants."""

from __future__ import annotations

import unittest
from typing import Any, ClassVar
from unittest import mock

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from mmmamba_cli.model import ATTENTION, LINEAR, HolisticVLM, HolisticVLMConfig

# Below the drawn ids, so that it exists when a test shrinks the vocabulary.
IMAGE_TOKEN = 3
IMAGE_SIZE = 8
TOKENS_PER_TILE = 4


class SmallModels:
    """Model tester of the mixins: small random configs and inputs of one variant."""

    batch_size, seq_length, is_training = 3, 9, True
    vocab_size, hidden_size, num_attention_heads, num_key_value_heads = 99, 32, 4, 2
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, layer_types: tuple[str, ...], pixel_shuffle: str | None):
        self.layer_types = layer_types
        self.num_hidden_layers = len(layer_types)
        self.pixel_shuffle = pixel_shuffle

    def get_config(self) -> HolisticVLMConfig:
        return HolisticVLMConfig(**self.config_values())

    def config_values(self) -> dict[str, Any]:
        vision = {}
        embedding_layers = 0 if self.pixel_shuffle is None else 1
        if self.pixel_shuffle is not None:
            vision = {
                "image_size": IMAGE_SIZE,
                "patch_size": 2,
                "num_channels": 3,
                "downsample_ratio": 0.5,
                "pixel_shuffle": self.pixel_shuffle,
                "image_token_id": IMAGE_TOKEN,
            }
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "layer_types": list(self.layer_types),
            "embedding_stack": self._stack(embedding_layers) if embedding_layers else None,
            "language_stack": self._stack(self.num_hidden_layers - embedding_layers),
            **({"vision": vision} if vision else {}),
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }

    def _stack(self, layers: int) -> dict[str, int]:
        return {
            "num_layers": layers,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "intermediate_size": 37,
            "max_position_embeddings": 512,
        }

    def prepare_config_and_inputs_for_common(self) -> tuple[HolisticVLMConfig, dict[str, Any]]:
        # Neither a special token nor an image token is drawn.
        first = IMAGE_TOKEN + 1
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - first) + first
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pixel_shuffle is not None:
            ids[:, 1 : 1 + TOKENS_PER_TILE] = IMAGE_TOKEN
            inputs["pixel_values"] = floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE])
        return self.get_config(), inputs


class Common(ModelTesterMixin, GenerationTesterMixin):
    all_model_classes = (HolisticVLM,)
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}
    layer_types: tuple[str, ...] = ()
    pixel_shuffle: str | None = None

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        """Add labels if requested; the mixin does so only for transformers' own classes."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def setUp(self) -> None:
        self.model_tester = SmallModels(self.layer_types, self.pixel_shuffle)
        self.has_attentions = ATTENTION in self.layer_types
        self.config_tester = ConfigTester(
            self,
            config_class=HolisticVLMConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
            **self.model_tester.config_values(),
        )

    def test_config(self) -> None:
        """All checks but one: config.json stores `vision_config` as `vision`."""
        with mock.patch.object(
            self.config_tester, "create_and_test_config_from_and_save_pretrained_composite"
        ):
            self.config_tester.run_common_tests()


class AttentionText(Common, unittest.TestCase):
    layer_types = (ATTENTION, ATTENTION)


class HybridText(Common, unittest.TestCase):
    layer_types = (ATTENTION, LINEAR)


class LinearText(Common, unittest.TestCase):
    layer_types = (LINEAR, LINEAR)


class AttentionPictures(Common, unittest.TestCase):
    layer_types = (ATTENTION, ATTENTION)
    pixel_shuffle = "pre"


class HybridPictures(Common, unittest.TestCase):
    layer_types = (ATTENTION, LINEAR)
    pixel_shuffle = "post"


class LinearPictures(Common, unittest.TestCase):
    layer_types = (LINEAR, LINEAR)
    pixel_shuffle = "post"


# Removed, so that pytest does not collect the mixins.
del Common, ModelTesterMixin, GenerationTesterMixin
