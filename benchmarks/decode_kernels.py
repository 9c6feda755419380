"""Time the kernels of a decoding step at HoVLE-2.6B's shapes, each inside a CUDA graph.

    python benchmarks/decode_kernels.py --out FILE.json [--tune] [--seconds N]

There is one copy of weights, states and caches per layer of the model, used in turn by the graph,
so that no data is in the GPU's cache. Every kernel is checked against its reference first. `--tune`
times tiles of every product within N seconds, most of which is compilation, and prints the best as
a table for `mmmamba_cli/ops/projection/fused.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from decode_shapes import (
    CACHE_COPIES,
    CHANNELS,
    COLUMNS,
    DEVICE,
    DIM,
    DTYPE,
    EPS,
    HEADS,
    KV_HEADS,
    LAYERS,
    PRODUCTS,
    WIDTH,
    Product,
    attempt,
    attention_arguments,
    gate,
    graph_ms,
    make_weights,
    mixer_arguments,
    mixer_weights,
    norm_options,
    normal,
    overlapped,
    product_ms,
    rates,
    wide,
)
from decode_tuning import print_table, tune_attention, tune_products, tune_steps
from torch import Tensor

from mmmamba_cli import ops
from mmmamba_cli.ops.decode import MixerWeights
from mmmamba_cli.ops.projection import Int8Weight


def check_product(product: Product, int8: bool, batch: int) -> float:
    (weight,) = make_weights(product, int8, 1)
    x, options = normal(batch, product.dim), product.options(batch, int8)
    found = ops.project(x, weight, **options, backend="triton")
    exact = weight if isinstance(weight, Int8Weight) else weight.float()
    wanted = ops.project(x.float(), exact, **wide(options), backend="reference")
    return gate(found, wanted)


def time_product(product: Product, int8: bool, batch: int) -> dict[str, Any]:
    weights = make_weights(product, int8)
    moved = product.rows * product.dim * (1 if int8 else 2)
    found: dict[str, Any] = {"error": check_product(product, int8, batch)}
    for on in (True, False) if batch == 1 else (True,):
        overlapped(on)
        name = "overlapping" if on else "one by one"
        ms = product_ms(product, weights, batch, 0.15)
        found[name] = rates(ms, len(weights), moved)
    overlapped(True)
    if not int8:
        x = normal(batch, product.dim)
        ms = graph_ms(lambda: [F.linear(x, weight) for weight in weights], 0.15)
        found["F.linear"] = rates(ms, len(weights), moved)
    return found


def time_products() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for int8, batch in ((False, 1), (True, 1), (False, 2), (False, 4), (False, 8)):
        key = f"{'int8' if int8 else 'bf16'}, batch {batch}"
        found[key] = {}
        for name, product in PRODUCTS.items():
            found[key][name] = attempt(lambda p=product, i=int8, b=batch: time_product(p, i, b))
            report(f"{key}, {name}", found[key][name])
    return found


# The operations of a mixer step.


def time_mixer(batch: int) -> dict[str, Any]:
    weights = mixer_weights()
    vkq, dt, ring, state, at = mixer_arguments(batch)
    exact = MixerWeights(*(None if w is None else w.double() for w in weights))
    given = (vkq.double(), dt.double(), ring.double(), state.double(), at)
    wanted = ops.mixer_step(*given, exact, backend="reference")
    found = ops.mixer_step(vkq, dt, ring, state, at, weights, backend="triton")
    error = max(gate(found, wanted), gate(state, given[3]))
    copies = [mixer_arguments(batch) for _ in range(LAYERS)]

    def call() -> None:
        for arguments in copies:
            ops.mixer_step(*arguments, weights, backend="triton")

    result: dict[str, Any] = {"error": error}
    for on in (True, False):
        overlapped(on)
        ms = graph_ms(call)
        result["overlapping" if on else "one by one"] = rates(ms, LAYERS, 2 * 4 * state.numel())
    overlapped(True)
    return result


def time_attention(columns: int) -> dict[str, Any]:
    angles = torch.randn(1, DIM // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    copies = [attention_arguments(columns) for _ in range(CACHE_COPIES)]
    short = attention_arguments(4099)
    exact = [tensor.double() for tensor in short[:5]]
    wanted = ops.attention_step(
        *exact, short[5], None, cos.double(), sin.double(), backend="reference"
    )
    found = ops.attention_step(*short, None, cos, sin, backend="triton")
    moved = 2 * 2 * KV_HEADS * DIM * columns

    def call() -> None:
        for arguments in copies:
            ops.attention_step(*arguments, None, cos, sin, backend="triton")

    def plain() -> None:
        for q, _, _, keys, values, _ in copies:
            F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)

    return {
        "error": gate(found, wanted),
        "kernels": rates(graph_ms(call), CACHE_COPIES, moved),
        "SDPA alone": attempt(lambda: rates(graph_ms(plain), CACHE_COPIES, moved)),
    }


# A whole linear model without its embedding: five launches per layer, and the head.


def make_chain(int8: bool) -> tuple[Callable[[str], Tensor], int]:
    """A step of 32 layers and the head, and the bytes of its weights and states."""
    layers = [
        {name: make_weights(p, int8, 1)[0] for name, p in PRODUCTS.items() if name != "head"}
        for _ in range(LAYERS)
    ]
    head = make_weights(PRODUCTS["head"], int8, 1)[0]
    mixers = [(mixer_weights(), *mixer_arguments(1)[2:]) for _ in range(LAYERS)]
    hidden = normal(1, WIDTH)
    kept = [(ring.clone(), state.clone()) for _, ring, state, _ in mixers]
    # As in a model: one per layer.
    norms = [{**norm_options(WIDTH, int8), "eps": EPS} for _ in range(2 * LAYERS + 1)]
    head_norms = [{**norm_options(DIM, int8), "eps": EPS} for _ in range(LAYERS)]

    def step(backend: str) -> Tensor:
        x = hidden.clone()
        for number, layer in enumerate(layers):
            weights, ring, state, at = mixers[number]
            first, second = norms[2 * number : 2 * number + 2]
            row = ops.project(x, layer["v|k|q|gate|dt"], **first, backend=backend)
            vkq, opened, dt = row.split((CHANNELS, HEADS * DIM, HEADS), 1)
            # States were written by the previous token, and the gate together with vkq.
            early = {"inputs_ready": True, "backend": backend}
            y = ops.mixer_step(vkq, dt, ring, state, at, weights, **early).flatten(1)
            options = {**head_norms[number], "gate": opened, "residual": x, "out": x, **early}
            ops.project(y, layer["W_O"], **options)
            y = ops.project(x, layer["w1|w3"], **second, swiglu=True, backend=backend)
            ops.project(y, layer["w2"], residual=x, out=x, backend=backend)
        return ops.project(x, head, **norms[-1], backend=backend)

    def from_the_start(backend: str) -> Tensor:
        for (_, ring, state, _), (old_ring, old_state) in zip(mixers, kept, strict=True):
            ring.copy_(old_ring)
            state.copy_(old_state)
        return step(backend)

    error = gate(from_the_start("triton"), from_the_start("reference"), 5e-2)
    print(f"chain, {'int8' if int8 else 'bf16'}: error against the reference {error:.2g}")
    size = sum(p.rows * p.dim * (LAYERS if n != "head" else 1) for n, p in PRODUCTS.items())
    states = 2 * 4 * LAYERS * HEADS * DIM * DIM
    return step, size * (1 if int8 else 2) + states


def time_chain(int8: bool) -> dict[str, Any]:
    step, moved = make_chain(int8)
    result: dict[str, Any] = {"bytes": moved}
    for on in (True, False):
        overlapped(on)
        name = "overlapping" if on else "one by one"
        result[name] = attempt(lambda: {"ms": round(graph_ms(lambda: step("triton"), 0.5), 4)})
    overlapped(True)
    return result


def report(name: str, value: Any) -> None:
    print(f"{name}: {json.dumps(value)}", flush=True)


def copy_rate() -> float:
    """GB/s read and written by a copy of 1 GB, the practical upper bound of a kernel."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return round(2 * source.numel() / graph_ms(lambda: target.copy_(source)) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=240)
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "what": "kernels of a decoding step at HoVLE-2.6B's shapes, random weights",
        "command": "python benchmarks/decode_kernels.py" + (" --tune" if options.tune else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "seed": 0,
    }
    sections: dict[str, Callable[[], Any]] = {"copy_gb_per_s": copy_rate}
    if options.tune:
        share = options.seconds / 10
        sections["tiles"] = lambda: tune_products(7 * share)
        sections["mixer_step tiles, batch 1"] = lambda: tune_steps(1, share / 2)
        sections["mixer_step tiles, batch 64"] = lambda: tune_steps(64, share / 2)
        sections["attention_step tiles"] = lambda: tune_attention(2 * share)
    for int8 in (False, True):
        sections[f"linear model, {'int8' if int8 else 'bf16'}"] = lambda i=int8: time_chain(i)
    for batch in (1, 64, 256):
        sections[f"mixer_step, batch {batch}"] = lambda b=batch: time_mixer(b)
    for columns in (4096, COLUMNS):
        sections[f"attention_step, {columns} columns"] = lambda c=columns: time_attention(c)
    sections["products"] = time_products
    began = time.perf_counter()
    with torch.inference_mode():
        for name, section in sections.items():
            result[name] = attempt(section)
            torch.cuda.empty_cache()
            if name != "products":
                report(name, result[name])
            result["seconds"] = round(time.perf_counter() - began, 1)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.tune:
        print_table()


if __name__ == "__main__":
    main()
