"""The model through transformers' interfaces: Auto classes, device maps, Trainer, peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import prompt, small_model
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import mmmamba_cli
from mmmamba_cli.model import HolisticDecoder

IDS = torch.arange(2, 22)[None]


@pytest.fixture(params=["pre", "post"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = small_model("amam", request.param, d_skip=True)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@torch.no_grad()
def test_base_model_by_its_auto_class(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    ids, pixels = prompt(1, 9)
    base = AutoModel.from_pretrained(folder)
    assert type(base) is HolisticDecoder and isinstance(base, PreTrainedModel)
    out = base(ids, pixels, output_hidden_states=True)
    assert torch.equal(model.lm_head(out.last_hidden_state), model(ids, pixels).logits)
    assert out.hidden_states[-1] is out.last_hidden_state and len(out.hidden_states) == 5
    assert isinstance(base(ids, pixels, return_dict=False), tuple)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(ids, pixels).last_hidden_state, out.last_hidden_state)


@torch.no_grad()
def test_layers_on_disk(saved: tuple[Any, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, folder = saved
    ids, pixels = prompt(1, 9)
    parts = [name for name, _ in model.model.named_children() if name != "layers"]
    places = {f"model.{name}": "disk" for name in parts} | {"lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" for i in range(4)}
    for kept in ("", "model.text_embedding"):
        device_map = {**places, kept: "cpu"} if kept else {"": "disk"}
        spread = AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert next(spread.model.layers.parameters()).is_meta
        assert torch.equal(spread(ids, pixels).logits, model(ids, pixels).logits)
        made = spread.generate(ids, pixel_values=pixels, max_new_tokens=4)
        assert torch.equal(made, model.generate(ids, pixel_values=pixels, max_new_tokens=4))


def test_layouts_are_moved_once_per_device() -> None:
    """accelerate calls `to` of a layer's arguments for every layer."""
    mask = torch.ones_like(IDS)
    columns = small_model().model.prepare(IDS, attention_mask=mask).language_layout
    assert columns.to("cpu") is columns
    moved = columns.to("meta")
    assert moved is columns.to(torch.device("meta")) is not columns
    assert moved.cos.device.type == moved.mask.device.type == moved.key_mask.device.type == "meta"
    assert (moved.past, moved.length) == (columns.past, columns.length)


def test_load_is_trainable_unless_frozen(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    model = mmmamba_cli.load(str(folder))
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert not any(p.requires_grad for p in mmmamba_cli.load(str(folder), frozen=True).parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_changes_what_load_gives(
    saved: tuple[Any, Path], tmp_path: Path, checkpointing: bool
) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    _, folder = saved
    model = mmmamba_cli.load(str(folder))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = {"input_ids": IDS[0], "labels": IDS[0]}
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    found = Trainer(model=model, args=settings, train_dataset=[row] * 4).train()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    # Text alone: the vision part has no gradient.
    assert changed == [name for name in before if ".vision." not in name]
    small = small_model("amam", model.config.vision_config.pixel_shuffle, d_skip=True)
    assert abs(found.training_loss - small(IDS, labels=IDS).loss.item()) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_peft_adapters_and_virtual_tokens(saved: tuple[Any, Path]) -> None:
    peft = pytest.importorskip("peft")
    _, folder = saved
    ids, pixels = prompt(1, 9)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(mmmamba_cli.load(str(folder)), lora)
    model(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning and all(p.grad is not None for p in learning)
    made = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3)
    assert made.shape == (1, ids.shape[1] + 3)
    virtual = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(mmmamba_cli.load(str(folder)), virtual)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    made = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3)
    assert made.shape == (1, 23)
