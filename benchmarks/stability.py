"""Bars of `mmmamba inspect --stability`: precision over 32,768 tokens, certificates, exponents.

    python benchmarks/stability.py [--part PART ...] [--out FILE]

Parts, each with its own entry of the JSON object:

- precision: logits of bf16 against fp32 of the shipped models over `--tokens` tokens of the pages
  in docs/, by teacher forcing; the slope of log KL over log position with its interval.
- reversed: the same of the students with the pages in reverse order: a slope that comes from the
  text, and not from the length, changes with the order.
- certificates: log decays of a small random model of each recurrent mixer on 1,000 random prompts,
  in fp64, and the smallest distance to their certificates.
- exponents: the largest exponent of a whole student by tangents over the second half of 2,000
  tokens, beside the largest exponent of a head: the student of the golden tensors, scenes-linear.
- report: seconds of the whole measurement of scenes-linear without tangents.

`--out FILE` keeps the parts that FILE has already.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / "model")]

from small import IMAGE_ID, MIXERS, small_model  # noqa: E402

from mmmamba_cli.architecture import mixer_specs  # noqa: E402
from mmmamba_cli.checkpoint import atomic_write_text, load_model  # noqa: E402
from mmmamba_cli.profiling.timers import device_name  # noqa: E402
from mmmamba_cli.runs import resolve_path  # noqa: E402
from mmmamba_cli.runs.manifest import package_versions  # noqa: E402
from mmmamba_cli.stability import (  # noqa: E402
    StabilityOptions,
    encode_text,
    measure_stability,
    sample_text,
)
from mmmamba_cli.stability.decay_spectrum import (  # noqa: E402
    certified_exponents,
    observed_mixers,
)
from mmmamba_cli.stability.measurement import measure_tangents  # noqa: E402
from mmmamba_cli.stability.model_layers import decaying_layers  # noqa: E402

MODELS = ("scenes-linear", "scenes-hybrid", "scenes-teacher")
PROMPTS, PROMPT_TOKENS = 1000, 32
EXPONENT_TOKENS = 2000


def pages(backwards: bool = False) -> str:
    """The pages of docs/ in the order of their names, or in the reverse order."""
    files = sorted((ROOT / "docs").rglob("*.md"), reverse=backwards)
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def precision(
    given: argparse.Namespace, models: Sequence[str] = MODELS, backwards: bool = False
) -> dict[str, Any]:
    text = pages(backwards)
    found: dict[str, Any] = {
        "tokens": given.tokens,
        "text": f"docs/**/*.md in the {'reverse ' if backwards else ''}order of their names",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    for name in models:
        resolved = resolve_path(Path(name))
        ids = encode_text(resolved.require_processor("measured", "-"), text, "docs", given.tokens)
        begun = time.monotonic()
        record = measure_stability(
            resolved, ids, "docs", StabilityOptions(perturb=0, device="cpu", seed=given.seed)
        )
        assert record.precision is not None
        found[name] = {
            "seconds": round(time.monotonic() - begun, 1),
            **record.precision.model_dump(mode="json"),
        }
        print(name, found[name]["slope"], file=sys.stderr)
    return found


def certificates(given: argparse.Namespace) -> dict[str, Any]:
    """The smallest certificate - log gamma over all tokens, as a share of the certificate."""
    found: dict[str, Any] = {"prompts": PROMPTS, "tokens": PROMPT_TOKENS}
    letters = {name: letter for letter, name in MIXERS.items()}
    generator = torch.Generator().manual_seed(given.seed)
    ids = torch.randint(2, IMAGE_ID, (PROMPTS, PROMPT_TOKENS), generator=generator)
    for name, spec in mixer_specs().items():
        if spec.decay is None:
            continue
        model = small_model(letters[name] * 4, seed=given.seed).double()
        found[name] = smallest_distances(model, ids)
    return found


def smallest_distances(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Over all tokens, heads and channels of each layer: violations, and the tightest bound."""
    mixers = decaying_layers(model)
    violations, checked, tightest = 0, 0, float("inf")

    def on_call(layer: int, hidden: torch.Tensor, *rest: object) -> None:
        nonlocal violations, checked, tightest
        certified = certified_exponents(model, layer)
        ratio = mixers[layer].log_decay(hidden) / certified
        violations += int((ratio < 1).sum())
        checked += ratio.numel()
        tightest = min(tightest, float(ratio.min()))

    with torch.no_grad(), observed_mixers(model, on_call):
        for part in ids.split(100):
            model(part, use_cache=False)
    return {"checked": checked, "violations": violations, "smallest_ratio_to_certificate": tightest}


def exponents(given: argparse.Namespace) -> dict[str, Any]:
    golden = load_model(
        ROOT / "tests/golden_related/lyapunov", device="cpu", dtype=torch.float32, frozen=True
    ).double()
    generator = torch.Generator().manual_seed(given.seed)
    random_ids = torch.randint(0, 23, (1, EXPONENT_TOKENS), generator=generator)
    linear = resolve_path(Path("scenes-linear"))
    ids = encode_text(
        linear.require_processor("measured", "-"), sample_text(), "text", EXPONENT_TOKENS
    )
    options = StabilityOptions(tangents=given.vectors, seed=given.seed)
    found = {}
    for name, model, tokens in (
        ("golden student", golden, random_ids),
        ("scenes-linear", linear.load("cpu", torch.float32), torch.tensor([ids])),
    ):
        begun = time.monotonic()
        record = measure_tangents(model, tokens, options)
        difference = abs(record.halves[1] - record.head_exponents[1])
        found[name] = {
            **record.model_dump(mode="json"),
            "second_half_difference": difference,
            "second_half_relative": difference / abs(record.head_exponents[1]),
            "seconds": round(time.monotonic() - begun, 1),
        }
        print(name, found[name], file=sys.stderr)
    return found


def report(given: argparse.Namespace) -> dict[str, Any]:
    resolved = resolve_path(Path("scenes-linear"))
    ids = encode_text(resolved.require_processor("measured", "-"), sample_text(), "text", None)
    begun, used = time.monotonic(), time.process_time()
    measure_stability(resolved, ids, "the installed text", StabilityOptions(device="cpu"))
    return {
        "tokens": len(ids),
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "certificates": certificates,
    "report": report,
    "exponents": exponents,
    "precision": precision,
    "reversed": partial(precision, models=MODELS[:2], backwards=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    if given.out is not None and given.out.is_file():
        found = json.loads(given.out.read_text(encoding="utf-8"))
    for name in given.part:
        found[name] = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "device": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "versions": package_versions(),
            "seed": given.seed,
            **PARTS[name](given),
        }
        text = json.dumps(found, indent=1) + "\n"
        if given.out is not None:
            atomic_write_text(given.out, text)
    if given.out is None:
        print(text)


if __name__ == "__main__":
    main()
