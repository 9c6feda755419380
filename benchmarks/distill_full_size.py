"""Distillation steps at HoVLE-2.6B size on one GPU, compared with a reference implementation.

    python benchmarks/distill_full_size.py [--length 8192] [--compiled] [--only-ours]
                                           [--mixer NAME,...] [--out FILE]

Random weights, one row of text of the given length. "ours" are the stages of `mmmamba distill`.
"transcription" computes as the reference code does, with the same mixers and scan: the teacher's
attention as a T x T matrix, one autograd graph over all layers, full logits in fp32. If it runs out
of memory, the length is halved until it fits; ours is measured at each of these lengths too.
`--compiled` adds ours with torch.compile on every MLP; `--only-ours` does not time the
transcription. Before timing, losses and gradients of both must agree. With several mixers all are
measured in one run, and ours are compared with those of the first. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import mmmamba_cli
from mmmamba_cli.architecture import default_mixer, is_fp32_parameter, mixer_spec
from mmmamba_cli.checkpoint import hovle
from mmmamba_cli.data import Batch
from mmmamba_cli.distill.objective import build_objective
from mmmamba_cli.distill.optimiser import build_optimiser, clip_gradients
from mmmamba_cli.distill.teacher_student import TeacherStudent
from mmmamba_cli.distill.trainable import trainable_names
from mmmamba_cli.model import LINEAR, HolisticVLM, HolisticVLMConfig
from mmmamba_cli.model.block import SwiGLU
from mmmamba_cli.recipe import Stage, load_recipe
from mmmamba_cli.seed.initial_values import initial_value

WARMUP, REPEATS = 2, 5
# Builders of a training step for a pair and a stage, by name.
Ways = dict[str, Callable[[TeacherStudent, Stage], Callable[[Batch], float]]]
GIB = 2**30


def random_model(config: HolisticVLMConfig, device: str) -> HolisticVLM:
    """Random bf16 weights with fp32 norms near one, as in a loaded checkpoint."""
    with torch.device("meta"):
        model = HolisticVLM(config)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        small = is_fp32_parameter(name)
        dtype = torch.float32 if small else torch.bfloat16
        values = torch.empty(parameter.shape, device=device).normal_(std=0.02)
        if "norm" in name:
            values += 1
        parameter.data = values.to(dtype)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def make_pair(
    raw: dict[str, Any], stage: Stage, mixer: str, device: str, precision: str
) -> TeacherStudent:
    """A random teacher and its seeded student of one mixer; frozen tensors are shared."""
    torch.manual_seed(0)
    teacher = random_model(hovle.to_config(raw), device)
    if precision == "fp32":
        teacher.float()
    layers = teacher.config.num_hidden_layers
    layer_types, mixers = [mixer_spec(mixer).layer_type] * layers, [mixer] * layers
    config = HolisticVLMConfig.from_dict(
        {**teacher.config.to_dict(), "layer_types": layer_types, "mixers": mixers}
    )
    with torch.device("meta"):
        student = HolisticVLM(config)
    theirs = dict(teacher.named_parameters())
    names = trainable_names(stage, config, [name for name, _ in student.named_parameters()])
    for name, shape in [(n, tuple(p.shape)) for n, p in student.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        value = theirs.get(name)
        if value is None:
            first = initial_value(name, shape, mixer, "inherit+mimic", 0).to(device)
            value = torch.nn.Parameter(first, requires_grad=False)
        if name in names:
            value = torch.nn.Parameter(value.detach().clone().float())
        setattr(student.get_submodule(owner), leaf, value)
    return TeacherStudent(teacher, student.eval(), precision, tuple(names))


def text_batch(length: int, vocabulary: int, device: str) -> Batch:
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(1000, vocabulary - 1000, (1, length), generator=rng).to(device)
    return Batch(ids, ids.clone(), None, None, None, 1, length)


def transcribed_mixer_loss(pair: TeacherStudent, batch: Batch, scale: float) -> Tensor:
    """Stages 1 and 2 as in the reference: one autograd graph over all layers."""
    decoder = pair.teacher.model
    prompt = decoder.prepare(batch.input_ids)
    hidden = decoder.embed(prompt)
    losses = []
    for index, block in enumerate(decoder.blocks):
        columns = (
            prompt.embedding_layout
            if index < decoder.num_embedding_layers
            else prompt.language_layout
        )
        if index == decoder.num_embedding_layers:
            hidden = decoder.embedding_to_language(hidden, prompt)
        normed = block.mixer_norm(hidden)
        taught = materialised_attention(block.mixer, normed, columns)
        learned = pair.student.model.blocks[index].mixer.mix(normed, columns)
        losses.append(F.mse_loss(learned.float(), taught.float()))
        hidden = block.after_mixer(hidden, block.mixer.o_proj(taught))
    return scale * torch.stack(losses).mean()


def transcribed_kl(pair: TeacherStudent, batch: Batch) -> Tensor:
    """Stage 3 as in the reference: full logits of both models, all activations kept."""
    prompt = pair.teacher.model.prepare(batch.input_ids)
    with torch.no_grad():
        decoder = pair.teacher.model
        hidden = decoder.embed(prompt)
        for index, block in enumerate(decoder.blocks):
            columns = (
                prompt.embedding_layout
                if index < decoder.num_embedding_layers
                else prompt.language_layout
            )
            if index == decoder.num_embedding_layers:
                hidden = decoder.embedding_to_language(hidden, prompt)
            mixed = materialised_attention(block.mixer, block.mixer_norm(hidden), columns)
            hidden = block.after_mixer(hidden, block.mixer.o_proj(mixed))
        expected = pair.teacher.lm_head(decoder.norm(hidden)).float()
    pair.student.model.checkpoint_layers(False)
    actual = pair.student.lm_head(pair.student.model.forward_prepared(prompt)).float()
    p, q = (torch.log_softmax(x, dim=-1) for x in (expected, actual))
    return F.kl_div(q, p, log_target=True, reduction="sum") / batch.num_tokens


def materialised_attention(mixer: Any, hidden: Tensor, columns: Any) -> Tensor:
    """softmax(q k^T / sqrt(P) + mask) v with a materialized matrix and fp32 softmax."""
    q, k, v = (x.transpose(1, 2) for x in mixer.queries_keys_values(hidden, columns))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    length = q.shape[2]
    mask = torch.full((length, length), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    scores = q @ k.transpose(2, 3) / mixer.head_dim**0.5 + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def ours(pair: TeacherStudent, stage: Stage) -> Callable[[Batch], float]:
    """Loss and gradients as in the training loop."""
    objective = build_objective(stage, pair.student.config, pair.trainable)

    def run(batch: Batch) -> float:
        pair.student.train()
        pair.student.model.checkpoint_layers(not objective.layer_local)
        weights = objective.term_weights(objective.count_units(pair, batch))
        return float((weights * objective.loss_sums(pair, batch, weights).cpu()).sum())

    return run


def transcription(pair: TeacherStudent, stage: Stage) -> Callable[[Batch], float]:
    def run(batch: Batch) -> float:
        with pair.autocast():
            if stage.loss == "kl":
                loss = transcribed_kl(pair, batch)
            else:
                loss = transcribed_mixer_loss(pair, batch, stage.loss_scale)
        loss.backward()
        return float(loss)

    return run


def compiled(pair: TeacherStudent, stage: Stage) -> Callable[[Batch], float]:
    """Ours with compiled MLPs in both models, which fuses the elementwise operations."""
    run, plain = ours(pair, stage), SwiGLU.forward
    fast = torch.compile(plain, dynamic=False)

    def through_the_compiler(batch: Batch) -> float:
        SwiGLU.forward = fast  # type: ignore[method-assign]
        try:
            return run(batch)
        finally:
            SwiGLU.forward = plain  # type: ignore[method-assign]

    return through_the_compiler


def measure(
    pair: TeacherStudent, stage: Stage, compute: Callable[[Batch], float], batch: Batch
) -> Any:
    """Median seconds of an optimiser step, and its peak memory beyond the persistent state."""
    parameters = pair.trainable_parameters()
    optimiser = build_optimiser(stage, parameters)
    owned = {id(p): p.nbytes for m in (pair.teacher, pair.student) for p in m.parameters()}
    held = sum(owned.values()) + 3 * sum(p.nbytes for p in parameters.values())
    seconds, loss = [], 0.0
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = compute(batch)
        clip_gradients(parameters, stage.optimiser.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARMUP:])
    peak = torch.cuda.max_memory_allocated()
    return {
        "seconds": round(median, 4),
        "spread": [round(min(seconds[WARMUP:]), 4), round(max(seconds[WARMUP:]), 4)],
        "tokens_per_second": round(batch.num_tokens / median),
        "peak_gib": round(peak / GIB, 2),
        "beyond_weights_gradients_optimiser_gib": round((peak - held) / GIB, 2),
        "loss": loss,
    }


def attempt(work: Callable[[], Any]) -> Any:
    """The result of `work`, or a note that it ran out of memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def gate(raw: dict[str, Any], stage: Stage, mixer: str, length: int) -> dict[str, float]:
    """Relative differences of loss and gradient on one small fp32 batch."""
    pair = make_pair(raw, stage, mixer, "cuda", "fp32")
    batch = text_batch(length, pair.teacher.config.vocab_size, "cuda")
    found = []
    for compute in (ours(pair, stage), transcription(pair, stage)):
        for parameter in pair.trainable_parameters().values():
            parameter.grad = None
        loss = compute(batch)
        grads = [p.grad.flatten().cpu() for p in pair.trainable_parameters().values()]
        found.append((loss, torch.cat(grads)))
    (loss, gradient), (other, expected) = found
    distance = float((gradient - expected).norm() / expected.norm())
    result = {"loss": abs(loss - other) / abs(other), "gradient": distance}
    if not max(result.values()) < 1e-3:
        raise SystemExit(f"the two ways differ: {result}")
    return result


def compare(
    raw: dict[str, Any], stage: Stage, mixer: str, longest: int, ways: Ways
) -> dict[str, Any]:
    """Rows of all variants from `longest` down to the first length that the transcription fits."""
    rows: dict[str, Any] = {}
    length = longest
    while length >= 256:
        row = {}
        for name, way in ways.items():
            pair = make_pair(raw, stage, mixer, "cuda", "bf16")
            batch = text_batch(length, pair.teacher.config.vocab_size, "cuda")
            compute = way(pair, stage)
            row[name] = attempt(lambda: measure(pair, stage, compute, batch))  # noqa: B023
            del pair, compute
            gc.collect()
            torch.cuda.empty_cache()
        if "seconds" in row.get("transcription", {}):
            ratio = row["transcription"]["seconds"] / row["ours"]["seconds"]
            row["speed_ratio"] = round(ratio, 2)
        rows[str(length)] = row
        print(json.dumps({mixer: {stage.name: {length: row}}}), flush=True)
        if "speed_ratio" in row or "transcription" not in ways:
            break
        length //= 2
    return rows


def measure_mixer(
    raw: dict[str, Any], stages: Sequence[Stage], mixer: str, longest: int, ways: Ways
) -> dict[str, Any]:
    """The gates of all stages, then the rows of all stages."""
    gates = {stage.name: attempt(lambda s=stage: gate(raw, s, mixer, 512)) for stage in stages}
    print(json.dumps({mixer: {"gate": gates}}), flush=True)
    rows = {stage.name: compare(raw, stage, mixer, longest, ways) for stage in stages}
    return {"gate_relative_differences": gates, "rows": rows}


def times_first(rows: dict[str, Any], first: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Ratio of the step time of a mixer to that of the first mixer, by stage and length."""
    found: dict[str, dict[str, float]] = {}
    for stage, lengths in rows.items():
        for length, row in lengths.items():
            other = first[stage].get(length, {})
            if "seconds" in row["ours"] and "seconds" in other.get("ours", {}):
                ratio = row["ours"]["seconds"] / other["ours"]["seconds"]
                found.setdefault(stage, {})[length] = round(ratio, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--stages", default="stage1,stage2,stage3")
    parser.add_argument("--mixer", default=default_mixer(LINEAR))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--only-ours", action="store_true")
    given = parser.parse_args()
    ways: Ways = {"ours": ours}
    if not given.only_ours:
        ways["transcription"] = transcription
    if given.compiled:
        ways["compiled"] = compiled
    raw = hovle.ARCHITECTURES["hovle-2.6b"]
    stages = [s for s in load_recipe("mmmamba-linear").stages if s.name in given.stages]
    first, *others = (
        (mixer, measure_mixer(raw, stages, mixer, given.length, ways))
        for mixer in given.mixer.split(",")
    )
    result = {
        "what": "one optimiser step of distillation, HoVLE-2.6B shapes, random weights, batch 1",
        "command": " ".join(["python", "benchmarks/distill_full_size.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "mmmamba": mmmamba_cli.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "precision": "bf16 autocast, fp32 masters",
        "scan": "as auto takes it, on both sides",
        "mixer": first[0],
        **first[1],
        "other_mixers": {
            mixer: {**one, "times_first": times_first(one["rows"], first[1]["rows"])}
            for mixer, one in others
        },
    }
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
