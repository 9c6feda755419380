"""Process group, FSDP sharding and seeds, for one process or several."""

from mmmamba_cli.distributed.fsdp import average_unsharded_gradients, is_sharded, shard_mixers
from mmmamba_cli.distributed.world import (
    World,
    join_world,
    limit_cpu_threads,
    seed_everything,
    step_seed,
)

__all__ = [
    "World",
    "average_unsharded_gradients",
    "is_sharded",
    "join_world",
    "limit_cpu_threads",
    "seed_everything",
    "shard_mixers",
    "step_seed",
]
