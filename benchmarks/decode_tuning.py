"""Autotuning of the launch configurations of a decoding step for this GPU."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from decode_shapes import (
    CACHE_COPIES,
    COLUMNS,
    DEVICE,
    DIM,
    DTYPE,
    LAYERS,
    PRODUCTS,
    Product,
    attempt,
    attention_arguments,
    graph_ms,
    make_weights,
    mixer_arguments,
    mixer_weights,
    normal,
    product_ms,
)

from mmmamba_cli import ops
from mmmamba_cli.ops.decode import fused as decode
from mmmamba_cli.ops.projection import fused as projection
from mmmamba_cli.ops.projection.fused import Tile

Case = tuple[str, bool]


def tiles_of(product: Product, int8: bool) -> Iterator[Tile]:
    for rows, size, warps in itertools.product(
        (1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096), (1, 2, 4, 8)
    ):
        if product.swiglu and rows == 1:
            continue
        each = rows * size / (32 * warps)
        # Each thread loads at least 16 bytes and does not spill registers.
        if size >= 256 * warps // (1 if int8 else 2) and 16 <= each <= (128 if int8 else 96):
            yield Tile(rows, size, warps)


def cases() -> list[Case]:
    return list(itertools.product(PRODUCTS, (False, True)))


def key_of(case: Case) -> tuple[int, int, int]:
    product = PRODUCTS[case[0]]
    return product.rows, product.dim, 1 if case[1] else 2


def compile_tiles(jobs: list[tuple[Case, Tile]]) -> None:
    """Run each product with each tile once, in a process of its own.

    Triton caches compiled kernels on disk, where the timing process finds them.
    """
    jobs.sort(key=lambda job: job[0])
    with torch.inference_mode():
        for case, found in itertools.groupby(jobs, key=lambda job: job[0]):
            product = PRODUCTS[case[0]]
            (weight,) = make_weights(product, case[1], 1)
            x, options = normal(1, product.dim), product.options(1, case[1])
            for _, tile in found:
                projection.TILES[key_of(case)] = tile
                attempt(lambda w=weight, x=x, o=options: ops.project(x, w, **o, backend="triton"))


def tune_products(seconds: float) -> dict[str, Any]:
    """Find the best tiles of every product and put them into the table."""
    until = time.perf_counter() + seconds
    rng = random.Random(0)
    tiles: dict[Case, list[Tile]] = {}
    for case in cases():
        tiles[case] = list(tiles_of(PRODUCTS[case[0]], case[1]))
        rng.shuffle(tiles[case])
        known = projection.TILES.get(key_of(case))
        if known:
            # The entry of the table is timed first.
            tiles[case] = [known, *(tile for tile in tiles[case] if tile != known)]
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    jobs = [(case, tile) for case in tiles for tile in tiles[case]]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        # All of it if time allows: half of the time may be compilation.
        parts = [jobs[first::workers] for first in range(workers)]
        compiled = pool.map_async(compile_tiles, parts)
        compiled.wait(seconds / 2)
    found: dict[str, Any] = {"compiled in time": compiled.ready()}
    for place, case in enumerate(tiles):
        # The remaining cases share the remaining time.
        part = (until - time.perf_counter()) / (len(tiles) - place)
        timed = time_tiles(case, tiles[case], part)
        name = f"{case[0]}, {'int8' if case[1] else 'bf16'}"
        found[name] = {
            "timed": f"{len(timed)} of {len(tiles[case])}",
            "best": [[round(1e3 * ms, 2), *tile] for ms, tile in timed[:5]],
        }
        projection.TILES.pop(key_of(case), None)
        if timed:
            projection.TILES[key_of(case)] = timed[0][1]
    return found


def time_tiles(case: Case, tiles: list[Tile], seconds: float) -> list[tuple[float, Tile]]:
    """Milliseconds of a launch by tile, fastest first."""
    until = time.perf_counter() + seconds
    product, timed = PRODUCTS[case[0]], []
    weights = make_weights(product, case[1])
    for tile in tiles:
        if time.perf_counter() > until:
            break
        projection.TILES[key_of(case)] = tile
        ms = attempt(lambda: product_ms(product, weights, 1, 0.02))
        if isinstance(ms, float):
            timed.append((ms / len(weights), tile))
    return sorted(timed)


def tune_steps(batch: int, seconds: float) -> list[Any]:
    """Microseconds of `mixer_step` by values per program and warps, fastest first."""
    weights, copies = mixer_weights(), [mixer_arguments(batch) for _ in range(LAYERS)]
    until, found = time.perf_counter() + seconds, []

    def call() -> None:
        for arguments in copies:
            ops.mixer_step(*arguments, weights, backend="triton")

    kept = decode.SMALL_BATCH_BLOCK_P, decode.LARGE_BATCH_BLOCK_P, decode.MIXER_WARPS
    for values, warps in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8)):
        if time.perf_counter() < until and 16 <= values * DIM / (32 * warps) <= 128:
            decode.SMALL_BATCH_BLOCK_P = decode.LARGE_BATCH_BLOCK_P = values
            decode.MIXER_WARPS = warps
            found.append((round(1e3 * graph_ms(call, 0.05) / LAYERS, 2), values, warps))
    decode.SMALL_BATCH_BLOCK_P, decode.LARGE_BATCH_BLOCK_P, decode.MIXER_WARPS = kept
    return sorted(found)[:5]


def tune_attention(seconds: float) -> list[Any]:
    """Microseconds by programs, columns per tile, warps and stages, fastest first."""
    copies = [attention_arguments(COLUMNS) for _ in range(CACHE_COPIES)]
    cos = torch.ones(1, DIM, device=DEVICE, dtype=DTYPE)
    until, found = time.perf_counter() + seconds, []

    def call() -> None:
        for arguments in copies:
            ops.attention_step(*arguments, None, cos, cos, backend="triton")

    kept = (
        decode.ATTENTION_PROGRAMS,
        decode.ATTENTION_BLOCK_S,
        decode.ATTENTION_WARPS,
        decode.ATTENTION_STAGES,
    )
    choices = list(
        itertools.product((132, 264, 396, 528, 1056), (32, 64, 128), (2, 4, 8), (2, 3, 4))
    )
    random.Random(0).shuffle(choices)
    for choice in choices:
        if time.perf_counter() < until:
            decode.ATTENTION_PROGRAMS, columns, decode.ATTENTION_WARPS, decode.ATTENTION_STAGES = (
                choice
            )
            decode.ATTENTION_BLOCK_S = {**kept[1], 2: columns}
            ms = attempt(lambda: graph_ms(call, 0.03))
            if isinstance(ms, float):
                found.append((round(1e3 * ms / CACHE_COPIES, 1), *choice))
    (
        decode.ATTENTION_PROGRAMS,
        decode.ATTENTION_BLOCK_S,
        decode.ATTENTION_WARPS,
        decode.ATTENTION_STAGES,
    ) = kept
    return sorted(found)[:8]


def print_table() -> None:
    print("TILES: dict[tuple[int, int, int], Tile] = {")
    for key, tile in sorted(projection.TILES.items()):
        print(f"    {key}: Tile({', '.join(map(str, tile))}),")
    print("}")
