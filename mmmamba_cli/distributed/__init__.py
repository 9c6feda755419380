"""Process group, gradients over processes, FSDP sharding and seeds."""

from mmmamba_cli.distributed.fsdp import is_sharded, shard_mixers
from mmmamba_cli.distributed.gradient_sync import BUCKET_BYTES, GradientReducer, GradientSync
from mmmamba_cli.distributed.world import (
    World,
    join_world,
    limit_cpu_threads,
    seed_everything,
    step_seed,
)

__all__ = [
    "BUCKET_BYTES",
    "GradientReducer",
    "GradientSync",
    "World",
    "is_sharded",
    "join_world",
    "limit_cpu_threads",
    "seed_everything",
    "shard_mixers",
    "step_seed",
]
