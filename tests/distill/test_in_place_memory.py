"""Memory of distillation of transformers' models: one layer at a time, shared tensors."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, randomize, save_teacher
from in_place_distillation import make_batch, make_objective, make_stage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Qwen3VLForConditionalGeneration

from mmmamba_cli.checkpoint import open_in_place
from mmmamba_cli.distill import in_place_pair
from mmmamba_cli.distill.in_place_pair import load_in_place_pair
from mmmamba_cli.distill.model_pair import PairPlacement
from mmmamba_cli.errors import MmmambaError
from mmmamba_cli.recipe import load_recipe
from mmmamba_cli.runs import Run
from mmmamba_cli.seed.in_place_transfer import seed_in_place

NAME = "qwen3_vl"


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made since the mode began, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            id(t.untyped_storage())
            for t in tree_iter((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in before or storage in self._known:
                continue
            self._known.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def deep_teacher(layers: int) -> Any:
    config = FAMILIES[NAME].config()
    config.text_config.num_hidden_layers = layers
    return randomize(Qwen3VLForConditionalGeneration(config), 0).eval()


def peak_bytes(loss: str, layers: int, inputs: str) -> int:
    """Peak of the tensors of a loss beside weights and gradients, all layers linear."""
    learns = ("*_model.layers.*.self_attn.[qk]_proj.*",) if loss == "matrix-orientation" else None
    stage = make_stage(loss, learns, inputs=inputs)
    objective, pair = make_objective(
        NAME, stage, linear=range(layers), teacher=deep_teacher(layers), dtype=torch.float32
    )
    for parameter in pair.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    batch = make_batch(NAME, dtype=torch.float32)
    weights = objective.term_weights(objective.count_units(pair, batch))
    with LiveBytes() as live:
        objective.loss_sums(pair, batch, weights)
    return live.peak


@pytest.mark.parametrize("loss", ["mixer-mse", "hidden-alignment", "matrix-orientation"])
def test_memory_does_not_grow_with_depth(loss: str) -> None:
    for inputs in ("teacher", "student") if loss == "mixer-mse" else ("teacher",):
        shallow, deep = (peak_bytes(loss, layers, inputs) for layers in (2, 8))
        assert shallow > 0 and abs(deep / shallow - 1) < 0.05, (shallow, deep)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a teacher whose head is its token table."""
    folder = tmp_path_factory.mktemp("shared")
    save_teacher(FAMILIES["gemma3"], folder / "teacher")
    run = Run(folder / "run")
    seed_in_place(
        run,
        open_in_place(folder / "teacher"),
        load_recipe("smoke"),
        dtype=torch.bfloat16,
        allow_bidirectional=True,
    )
    return run


def load(run: Run, precision: str, *trainable: str) -> Any:
    return load_in_place_pair(
        open_in_place(Path(run.teacher.path)),
        open_in_place(run.product_folder("seed")),
        trainable,
        PairPlacement(torch.bfloat16, precision, torch.device("cpu")),
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_frozen_parameters_are_the_teachers(run: Run, precision: str) -> None:
    layer = "model.language_model.layers.0.self_attn."
    learning = (f"{layer}q_proj.weight", f"{layer}A_log")
    pair = load(run, precision, *learning)
    theirs = dict(pair.teacher.named_parameters())
    wide = torch.bfloat16 if precision == "bf16" else torch.float32
    for name, parameter in pair.student.named_parameters():
        if name in learning:
            assert parameter.requires_grad and parameter.dtype == torch.float32
        elif name in theirs:
            assert parameter is theirs[name] and not parameter.requires_grad, name
            assert parameter.dtype == wide
        else:
            assert ".self_attn." in name and not parameter.requires_grad
            small = name.endswith(("A_log", "dt_bias", ".D", "g_norm.weight"))
            assert parameter.dtype == (torch.float32 if small else wide), name
    # The cast that the student got at seeding.
    q = pair.student.get_parameter(learning[0])
    assert torch.equal(theirs[learning[0]], q.to(wide))
    assert pair.lm_head.weight is pair.student.get_input_embeddings().weight


def test_a_tied_head_learns_under_both_names(run: Run) -> None:
    pair = load(run, "fp32", "model.language_model.embed_tokens.weight")
    assert pair.lm_head.weight is pair.trainable_parameters()[pair.trainable[0]]
    assert pair.lm_head.weight is not pair.teacher.get_output_embeddings().weight


def test_a_head_that_scales_logits_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = in_place_pair.InPlacePair.logits
    monkeypatch.setattr(
        in_place_pair.InPlacePair,
        "logits",
        lambda self, model, hidden: 1.1 * plain(self, model, hidden),
    )
    with pytest.raises(
        MmmambaError, match="gemma3 cannot be a teacher of distillation: its logits"
    ):
        load(run, "fp32", "model.language_model.layers.0.self_attn.A_log")
