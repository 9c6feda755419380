"""Check of teachers that are converted in place, on the installed transformers."""

from __future__ import annotations

from importlib.util import find_spec

from mmmamba_cli.doctor.report import FAILED, OK, Check

NAME = "teachers of transformers"
# Packages that processors of some families need, which no model does.
PROCESSOR_PACKAGES = ("torchvision", "num2words")
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
# Largest allowed difference of logits, which are about 1: fp32 rounding.
TOLERANCE = 1e-4


def check_teachers() -> Check:
    """Convert a tiny random Qwen3, and compare its logits with a cache to those without."""
    error = decoding_error()
    if not error <= TOLERANCE:
        return Check(
            NAME,
            FAILED,
            f"a student with a cache differs by {error:.1e} from itself without",
            "install the newest release of transformers that docs/versions.md lists as tested",
        )
    missing = [name for name in PROCESSOR_PACKAGES if find_spec(name) is None]
    said = "a tiny student decodes with a cache as without"
    if missing:
        said += (
            f"; processors of some families, Qwen-VL among them, need {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    return Check(NAME, OK, said)


def decoding_error() -> float:
    """The largest difference of logits between a prefill with two steps, and one call."""
    import torch
    from transformers import AutoConfig

    from mmmamba_cli.teachers import StudentPlan, convert

    config = AutoConfig.for_model("qwen3", **SIZES)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        student = convert(config, StudentPlan.of_layers(SIZES["num_hidden_layers"], (0,)))
        ids = torch.randint(0, SIZES["vocab_size"], (1, 8))
        whole = student(ids).logits
        found = student(ids[:, :6], use_cache=True)
        parts, cache = [found.logits], found.past_key_values
        for column in (6, 7):
            step = student(ids[:, column : column + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    return float((torch.cat(parts, 1) - whole).abs().max())
