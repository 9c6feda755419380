"""Training libraries: peft, Trainer, TRL; train, save, load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IMAGE_ID, distance, prompt, small_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mmmamba_cli.model import HolisticVLM

PLANS = ["aaaa", "amdw", "mmmm"]
NEW = 6


@pytest.fixture(autouse=True)
def same_adapters() -> None:
    """Adapters and virtual tokens are initialised randomly."""
    torch.manual_seed(0)


def trainable(plan: str, shuffle: str = "pre") -> Any:
    return small_model(plan, shuffle).requires_grad_(True)


def rows(count: int, length: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """Text samples without padding; labels are the ids."""
    found = [prompt(0, length, seed + i)[0][0] for i in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in found]


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}


def kept(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def step(model: Any, batch: dict[str, Any], rate: float = 0.1) -> float:
    """One step of gradient descent; return the loss before it."""
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, learning, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(learning, gradients, strict=True):
            if gradient is not None:
                parameter -= rate * gradient
    model.eval()
    return float(loss.detach())


def batch_with_a_picture() -> dict[str, Any]:
    ids, pixels = prompt(1, 9)
    labels = ids.masked_fill(ids == IMAGE_ID, -100)
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels}


def answer(model: Any) -> Tensor:
    ids, pixels = prompt(1, 9)
    # peft passes ids by keyword only.
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    return model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[
        :, -NEW:
    ]


class TestPeft:
    peft = pytest.importorskip("peft")

    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("shuffle", ["pre", "post"])
    @pytest.mark.parametrize("whole", [False, True])
    def test_lora(self, plan: str, shuffle: str, whole: bool, tmp_path: Path) -> None:
        """With and without fully trained modules; merged and loaded adapters agree."""
        config = self.peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules=["q_proj", "v_proj", "o_proj"],
            modules_to_save=["lm_head"] if whole else None,
        )
        base = trainable(plan, shuffle)
        before = kept(base)
        model = self.peft.get_peft_model(copy.deepcopy(base), config)
        losses = [step(model, batch_with_a_picture()) for _ in range(4)]
        assert losses[-1] < losses[0]
        said = answer(model)
        assert not torch.equal(said, answer(base))
        model.save_pretrained(tmp_path)
        again = self.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(answer(again), said)
        batch = batch_with_a_picture()
        with torch.no_grad():
            wanted = model(**batch).logits
            assert torch.equal(again(**batch).logits, wanted)
            merged = again.merge_and_unload()
            assert distance(merged(**batch).logits, wanted) < 1e-5
        learned = changed(merged, before)
        assert ("lm_head.weight" in learned) is whole
        assert all(name.split(".")[-2] in (*config.target_modules, "lm_head") for name in learned)

    @pytest.mark.parametrize("plan", PLANS)
    def test_prompt_tuning(self, plan: str, tmp_path: Path) -> None:
        config = self.peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        base = trainable(plan)
        before = kept(base)
        model = self.peft.get_peft_model(copy.deepcopy(base), config)
        ids, _ = prompt(0, 9)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        # A small learning rate, since the loss is steep in the first columns of these weights.
        losses = [step(model, batch, rate=1e-5) for _ in range(4)]
        assert losses[-1] < losses[0]
        assert changed(model.base_model, before) == set()

        def said(of: Any) -> Tensor:
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return of.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

        model.save_pretrained(tmp_path)
        again = self.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(said(again), said(model))
        with torch.no_grad():
            tuned = model(**batch)
            assert torch.equal(again(**batch).logits, tuned.logits)
            # The virtual tokens precede the prompt; labels skip their columns.
            embedded = base.get_input_embeddings()(ids)
            virtual = model.get_prompt(batch_size=1)
            plain = base(inputs_embeds=torch.cat((virtual, embedded), 1)).logits
        assert distance(tuned.logits, plain) < 1e-5


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in samples]) for name in samples[0]}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**settings | options)


def trained(model: Any, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> list[float]:
    """Losses of a `Trainer` over samples in order."""

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments: Any, **keywords: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    trainer = InOrder(
        model=model, args=arguments(folder, **options), train_dataset=data, data_collator=stack
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model: Any, data: list[dict[str, Tensor]], size: int, steps: int) -> list[float]:
    """The same losses from whole batches of `size`, without a library."""
    found = []
    for number in range(steps):
        batch = stack(data[number * size : (number + 1) * size])
        found.append(step(model, batch, rate=0.05))
    return found


class TestTrainer:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_accumulated_and_checkpointed_steps_equal_whole_batches(
        self, plan: str, checkpointing: bool, tmp_path: Path
    ) -> None:
        # fp64, since these random weights amplify fp32 rounding with every step.
        data, first = rows(12), trainable(plan).double()
        wanted, before = copy.deepcopy(first), kept(first)
        expected = by_hand(wanted, data, size=4, steps=3)
        calls = []
        first.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        losses = trained(
            first,
            tmp_path,
            data,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
        )
        # A checkpointed layer runs a second time in the backward pass.
        assert len(calls) == 3 * 2 * (2 if checkpointing else 1)
        assert losses == pytest.approx(expected, rel=1e-3)
        for name, parameter in wanted.state_dict().items():
            assert distance(first.state_dict()[name], parameter) < 1e-9, name
        # Text gives gradients to all parameters except the vision part.
        still = before.keys() - changed(first, before)
        assert all(name.startswith("model.vision.") for name in still)

    def test_unequal_numbers_of_labels_are_weighted_by_tokens(self, tmp_path: Path) -> None:
        data, first = rows(4), trainable("amam")
        data[0]["labels"][:7] = -100
        wanted = copy.deepcopy(first)
        expected = by_hand(wanted, data, size=4, steps=1)
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        losses = trained(first, tmp_path, data, max_steps=1, **options)
        assert losses == pytest.approx(expected, rel=1e-3)
        for name, parameter in wanted.state_dict().items():
            assert distance(first.state_dict()[name], parameter) < 1e-4, name

    def test_a_saved_and_loaded_model_gives_the_same_answers(self, tmp_path: Path) -> None:
        model = trainable("amam")
        before = answer(model)
        trained(
            model, tmp_path, rows(12), per_device_train_batch_size=4, save_strategy="steps",
            save_steps=3, learning_rate=0.5,
        )  # fmt: skip
        model.eval()
        said = answer(model)
        assert not torch.equal(said, before)
        again = HolisticVLM.from_pretrained(tmp_path / "checkpoint-3").eval()
        again.generation_config.suppress_tokens = [IMAGE_ID]
        assert torch.equal(answer(again), said)

    def test_training_resumes_from_a_checkpoint(self, tmp_path: Path) -> None:
        data, whole = rows(12), trainable("amam")
        options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
        parts = copy.deepcopy(whole)
        trained(whole, tmp_path / "whole", data, max_steps=4, **options)
        trained(parts, tmp_path / "parts", data, max_steps=2, **options)
        fresh = trainable("amam")
        trainer = Trainer(
            model=fresh,
            args=arguments(tmp_path / "parts", max_steps=4, **options),
            train_dataset=data,
            data_collator=stack,
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        for name, parameter in whole.state_dict().items():
            assert distance(fresh.state_dict()[name], parameter) < 1e-5, name

    def test_lora_with_checkpointing(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        base = trainable("amam")
        before = kept(base)
        model = peft.get_peft_model(base, config)
        options = {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
        losses = trained(model, tmp_path, rows(4) * 8, max_steps=8, learning_rate=0.5, **options)
        assert losses[-1] < losses[0]
        weights = {name for name, p in model.named_parameters() if p.requires_grad and p.any()}
        # lora_B starts at zero, so every one was trained.
        assert sum("lora_B" in name for name in weights) == 2 * 4
        plain = {
            n.replace(".base_layer", ""): p for n, p in model.base_model.model.named_parameters()
        }
        assert all(torch.equal(plain[n], p) for n, p in before.items() if n in plain)


def test_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(96)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="w2", bos_token="w1", pad_token="w0"
    )
    # A fixed fingerprint, so that the library does not pickle the generator.
    table = datasets.table.InMemoryTable.from_pydict(
        {"input_ids": [sample["input_ids"].tolist() for sample in rows(8)]}
    )
    data = datasets.Dataset(table, fingerprint="rows")
    model = trainable("amam")
    before = kept(model)
    settings = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 0.01, "report_to": [], "use_cpu": True, "logging_steps": 1, "bf16": False,
        "gradient_checkpointing": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**settings), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len(changed(model, before)) > len(before) / 2
    model.eval().save_pretrained(tmp_path / "saved")
    again = HolisticVLM.from_pretrained(tmp_path / "saved").eval()
    ids, _ = prompt(0, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
