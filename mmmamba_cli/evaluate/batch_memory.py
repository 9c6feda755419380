"""The number of tokens of a batch that fits a GPU, from the peak memory of one prompt."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from mmmamba_cli.evaluate.interfaces import EncodedPrompt, EvalModel

# Share of free memory for a batch; the rest is for fragmentation and longer answers.
FREE_MEMORY_SHARE = 0.8
PROBE_TOKENS = 8


def measure_batch_tokens(
    model: EvalModel, longest: EncodedPrompt, max_new_tokens: int, device: torch.device
) -> int | None:
    """Padded tokens that fit, from the peak memory of the longest prompt; None without CUDA.

    Raises:
        OutOfMemory: the prompt itself does not fit.
    """
    if device.type != "cuda":
        return None

    def try_it() -> None:
        if longest.prompt.choices:
            model.score_choices([longest])
        else:
            model.generate([longest], min(max_new_tokens, PROBE_TOKENS))

    taken = _peak_extra_bytes(try_it, device)
    free, _ = torch.cuda.mem_get_info(device)
    return tokens_that_fit(longest.length, taken, free)


def tokens_that_fit(length: int, taken: int, free: int) -> int:
    """Tokens that fit into `free` bytes if `length` of them take `taken`; at least `length`."""
    return max(1, int(FREE_MEMORY_SHARE * free / max(1, taken))) * length


def _peak_extra_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Peak memory of `work` in bytes beyond the memory allocated before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak
