"""One process or many: the group of processes, sharding a built model, seeds."""

from mmmamba_cli.distributed.fsdp import average_whole, is_sharded, shard_mixers
from mmmamba_cli.distributed.world import (
    World,
    host_threads,
    join_world,
    seed_everything,
    step_seed,
)

__all__ = [
    "World",
    "average_whole",
    "host_threads",
    "is_sharded",
    "join_world",
    "seed_everything",
    "shard_mixers",
    "step_seed",
]
