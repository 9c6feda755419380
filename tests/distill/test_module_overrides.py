"""Overridden modules of transformers compute what the modules do."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor

from mmmamba_cli.distill import module_overrides
from mmmamba_cli.distill.module_overrides import RMS_NORMS, add_to_columns, override_modules
from mmmamba_cli.teachers import StudentPlan, convert, mixers_of
from mmmamba_cli.teachers.anatomy import text_decoder

# The model of transformers that has each class.
MODELS = {
    "LlamaRMSNorm": "llama",
    "MistralRMSNorm": "mistral",
    "Ministral3RMSNorm": "ministral3",
    "MixtralRMSNorm": "mixtral",
    "Qwen2RMSNorm": "qwen2",
    "Qwen2MoeRMSNorm": "qwen2_moe",
    "Qwen2_5_VLRMSNorm": "qwen2_5_vl",
    "Qwen3RMSNorm": "qwen3",
    "Qwen3MoeRMSNorm": "qwen3_moe",
    "Qwen3VLTextRMSNorm": "qwen3_vl",
    "Qwen3VLMoeTextRMSNorm": "qwen3_vl_moe",
}


def norm_of(name: str, dtype: torch.dtype) -> Any:
    module = f"transformers.models.{MODELS[name]}.modeling_{MODELS[name]}"
    norm = getattr(importlib.import_module(module), name)(24, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data.copy_(1 + 0.3 * torch.randn(24, generator=generator))
    return norm.to(dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The op takes its reference here; the list has the calls of it."""
    calls: list[Any] = []

    def rms_norm(*args: Any) -> Tensor:
        calls.append(args)
        return module_rms_norm(*args)

    module_rms_norm = module_overrides.rms_norm
    monkeypatch.setattr(module_overrides, "rms_norm", rms_norm)
    monkeypatch.setattr(module_overrides, "supports_triton", lambda *_: True)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(RMS_NORMS))
def test_norms_have_the_bits_of_their_class(
    name: str, dtype: torch.dtype, as_on_a_gpu: list[Any]
) -> None:
    norm, (x, y) = norm_of(name, dtype), (random(2, 3, 24, dtype=dtype) for _ in range(2))
    expected = norm(x)
    expected.sum().backward()
    weight_gradient, norm.weight.grad = norm.weight.grad, None
    module_overrides._override_norm(norm, keeps_dtype=False)
    found = norm(y)
    found.sum().backward()
    assert len(as_on_a_gpu) == 1
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(norm.weight.grad, weight_gradient)


@pytest.mark.parametrize("keeps_dtype", [True, False])
def test_a_master_weight_changes_the_dtype_of_a_norm_outside_of_mixers(
    keeps_dtype: bool, as_on_a_gpu: list[Any]
) -> None:
    norm, x = norm_of("Qwen3RMSNorm", torch.float32), random(3, 24, dtype=torch.bfloat16)
    expected = norm(x)
    assert expected.dtype == torch.float32
    module_overrides._override_norm(norm, keeps_dtype)
    assert torch.equal(norm(x), expected.to(torch.bfloat16) if keeps_dtype else expected)
    assert len(as_on_a_gpu) == keeps_dtype


def test_norms_of_the_text_decoder_are_overridden_once(as_on_a_gpu: list[Any]) -> None:
    family = FAMILIES["qwen3_vl"]
    student: Any = convert(family.model(), StudentPlan.of_layers(4, (0, 2)))
    for _ in range(2):
        override_modules(student)
    decoder, ids = text_decoder(student), torch.arange(5)[None]
    decoder(input_ids=ids, use_cache=False)
    # Two of a layer, one of q and of k in it, and the last.
    assert len(as_on_a_gpu) == 4 * 4 + 1
    assert next(iter(mixers_of(student))).q_norm.forward.args[1]
    other = copy.deepcopy(student)
    assert text_decoder(other).norm.forward.args[0] is text_decoder(other).norm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused norm needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(RMS_NORMS))
def test_norms_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    norm = norm_of(name, dtype).cuda()
    rounding = torch.finfo(dtype).eps
    results = []
    for override in (False, True):
        if override:
            module_overrides._override_norm(norm, keeps_dtype=False)
        norm.weight.grad = None
        x = random(2, 300, 24, dtype=dtype).detach().cuda().requires_grad_()
        found = norm(x)
        (found * random(2, 300, 24, dtype=dtype, seed=2).cuda()).sum().backward()
        results.append([found.detach(), x.grad, norm.weight.grad])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        difference = (found.double() - expected.double()).norm()
        assert float(difference / expected.double().norm()) < 2 * rounding


def test_a_norm_keeps_its_own_code_on_a_cpu() -> None:
    norm, x = norm_of("Qwen3RMSNorm", torch.float64), random(3, 24, dtype=torch.float64)
    expected = norm(x)
    module_overrides._override_norm(norm, keeps_dtype=True)
    assert torch.equal(norm(x), expected)


def test_other_norms_are_left_alone() -> None:
    gemma = FAMILIES["gemma3"].model()
    override_modules(gemma)
    assert not any("forward" in vars(module) for module in gemma.modules())


def test_deepstack_adds_features_to_image_tokens() -> None:
    decoder: Any = text_decoder(FAMILIES["qwen3_vl"].model())
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    results = []
    for add in (type(decoder)._deepstack_process, lambda _, *args: add_to_columns(*args)):
        hidden, features = random(2, 4, 3), random(4, 3, seed=2)
        found = add(decoder, hidden, mask, features)
        (found * random(2, 4, 3, seed=3)).sum().backward()
        results.append((found, hidden.grad, features.grad))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
