"""Steps by Triton kernels, eager and captured as a CUDA graph, equal the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import distance, join_pixels, pad_batch, prompt, small_model
from triton_device import (
    DEVICE,
    TOLERANCE,
    faithful_interpreter,  # noqa: F401
    poisoned_buffers,  # noqa: F401
)

from mmmamba_cli.inference import Generator, quantize
from mmmamba_cli.ops import BACKENDS

NEW = 6
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="graphs are captured on a GPU")


def batch(device: str) -> tuple[torch.Tensor, dict[str, Any]]:
    inputs = [prompt(2, 6, 0), prompt(0, 5, 1), prompt(1, 9, 2)]
    ids, mask = pad_batch([row for row, _ in inputs])
    pixels = join_pixels([p for _, p in inputs])
    assert pixels is not None
    return ids.to(device), {"pixel_values": pixels.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("plan", ["amam", "mmmm"])
def test_kernels_equal_the_reference(plan: str, int8: bool) -> None:
    ids, inputs = batch("cpu")
    model = small_model(plan, "post", conv_width=3, d_skip=True)
    if int8:
        quantize(model)
    expected = Generator(model, backend="reference")
    there, elsewhere = batch(DEVICE)
    found = Generator(model_on(DEVICE, plan, int8), graphs=False, backend="triton")
    logits = expected.prefill(ids, **inputs)
    assert distance(found.prefill(there, **elsewhere).cpu(), logits) < TOLERANCE[torch.float32]
    for _ in range(NEW):
        token = logits.argmax(-1, keepdim=True)
        logits = expected.step(token)
        # Small gates amplify rounding errors, which accumulate over the steps.
        assert distance(found.step(token.to(DEVICE)).cpu(), logits) < 1e-3


def model_on(device: str, plan: str, int8: bool = False, **options: Any) -> Any:
    options = options or {"conv_width": 3, "d_skip": True}
    model = small_model(plan, "post", **options).to(device)
    if int8:
        quantize(model)
    return model


def test_the_kernels_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    inputs_ready: list[bool] = []
    for op in ("project", "mixer_step", "attention_step"):
        kernel = BACKENDS[op]["triton"]

        def recorded(*arguments: Any, op: str = op, kernel: Any = kernel, **options: Any) -> Any:
            launched.append(op)
            if op == "mixer_step" or options.get("gate") is not None:
                inputs_ready.append(options["inputs_ready"])
            return kernel(*arguments, **options)

        monkeypatch.setitem(BACKENDS[op], "triton", recorded)
    generator = Generator(model_on(DEVICE, "aamm"), graphs=False, backend="triton")
    generator.prefill(prompt(0, 5)[0].to(DEVICE))
    launched.clear()
    inputs_ready.clear()
    generator.step(torch.tensor([[4]], device=DEVICE))
    layer = ["project", "mixer", "project", "project", "project"]
    attention, scan = (
        [name.replace("mixer", op) for name in layer] for op in ("attention_step", "mixer_step")
    )
    assert launched == [*attention, *attention, *scan, *scan, "project"]
    assert inputs_ready == [True] * 4


@on_gpu
@pytest.mark.parametrize("plan", ["aaaa", "amam", "mmmm"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "rope": True}])
def test_a_captured_step_equals_eager_launches(plan: str, options: dict[str, Any]) -> None:
    model = model_on("cuda", plan, **options)
    ids, inputs = batch("cuda")
    eager, captured = Generator(model, graphs=False), Generator(model, graphs=True)
    assert torch.equal(captured.prefill(ids, **inputs), eager.prefill(ids, **inputs))
    for token in range(3, 3 + NEW):
        column = torch.full((3, 1), token, device="cuda")
        assert torch.equal(captured.step(column), eager.step(column))
    for settings in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3}):
        wanted = eager.generate(ids, **inputs, max_new_tokens=20, **settings)
        assert torch.equal(captured.generate(ids, **inputs, max_new_tokens=20, **settings), wanted)


@on_gpu
def test_graphs_of_several_sizes_share_memory() -> None:
    model = model_on("cuda", "amam")
    eager, captured = Generator(model, graphs=False), Generator(model, graphs=True)
    prompts = [prompt(0, 5)[0], prompt(0, 300)[0], prompt(0, 700)[0], batch("cpu")[0][1:2]]
    prompts += [prompts[0].repeat(rows, 1) for rows in (2, 3, 4)]
    for _ in range(2):
        for ids in prompts:
            ids = ids.to("cuda")
            expected = eager.generate(ids, max_new_tokens=12)
            assert torch.equal(captured.generate(ids, max_new_tokens=12), expected)
    captured.release()
    ids = prompts[0].to("cuda")
    expected = eager.generate(ids, max_new_tokens=12)
    assert torch.equal(captured.generate(ids, max_new_tokens=12), expected)


@on_gpu
def test_sampling_advances_the_rng_between_replays() -> None:
    generator = Generator(model_on("cuda", "mmmm"), graphs=True)
    ids, _ = prompt(0, 5)
    ids = ids.to("cuda")
    drawn = [
        generator.generate(ids, max_new_tokens=30, temperature=3.0, seed=seed).tolist()
        for seed in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    assert len(set(drawn[0][0])) > 10


@on_gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_capture_during_an_answer_does_not_change_it(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_on("cuda", "amam")
    ids, inputs = batch("cuda")
    new = 40
    capacity = ids.shape[1] + new
    wide = Generator(model, graphs=True)
    expected = wide.generate(ids, **inputs, max_new_tokens=new, capacity=capacity, **options)
    monkeypatch.setattr("mmmamba_cli.inference.cache_pool.PAD_CAPACITY_TO", 16)
    monkeypatch.setattr("mmmamba_cli.inference.generator.ANSWER_COLUMNS", 2)
    generator = Generator(model, graphs=True)
    for _ in range(2):
        found = generator.generate(ids, **inputs, max_new_tokens=new, **options)
        assert torch.equal(found, expected)


@on_gpu
def test_packing_frees_the_old_weights() -> None:
    model = small_model("mmmm").to("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    Generator(model)
    # Sampler's tables and MixerWeights.A; blocks of 512 bytes.
    assert torch.cuda.memory_allocated() < before + 64 * 512
