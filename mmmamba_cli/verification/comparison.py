"""Comparisons of two models, or of a model with itself, as plain functions.

Legend: B rows, T columns, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmmamba_cli.doctor.op_checks import largest_error
from mmmamba_cli.profiling.correctness import TOLERANCES
from mmmamba_cli.teachers.anatomy import text_decoder
from mmmamba_cli.verification.prompts import Inputs, Prompts, to_model
from mmmamba_cli.verification.report import DIFFERENT, OK, CheckResult

# Columns whose logits are compared, the last ones: those of a long prompt would take gigabytes.
MAX_LOGIT_COLUMNS = 256
# A student may be this many times as far from itself as the stock class is from itself.
OWN_ERROR_FACTOR = 4


@dataclass(frozen=True)
class Rounding:
    """How far the stock class is from itself, as relative distances of logits.

    `cached`: decoding with a cache and without; `padded`: a row in a left-padded batch and alone,
    None if there is no batch.
    """

    cached: float
    padded: float | None

    @property
    def largest(self) -> float:
        return largest_error((self.cached, self.padded or 0.0))


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| by 2-norms, computed in fp64."""
    reference = expected.double()
    return float((found.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def allowed_distance(dtype: torch.dtype, own: float = 0.0) -> float:
    """The tolerance of the dtype, or four times the distance that the stock class itself has."""
    return max(TOLERANCES[dtype], OWN_ERROR_FACTOR * own)


@torch.no_grad()
def logits_of(model: Any, inputs: Inputs) -> Tensor:
    """Logits (B, T, V) without a cache, of the last `MAX_LOGIT_COLUMNS` columns at most."""
    kept = min(inputs["input_ids"].shape[1], MAX_LOGIT_COLUMNS)
    found: Tensor = model(**to_model(inputs, model), use_cache=False, logits_to_keep=kept).logits
    return found


@torch.no_grad()
def greedy_tokens(
    model: Any, inputs: Inputs, tokens: int, suppressed: Sequence[int], use_cache: bool = True
) -> tuple[Tensor, Tensor]:
    """The next `tokens` greedy tokens (B, N) and their logits (B, N, V)."""
    found = model.generate(
        **to_model(inputs, model),
        do_sample=False,
        num_beams=1,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        suppress_tokens=list(suppressed) or None,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences[:, -tokens:], torch.stack(found.logits, 1)


def compare_bits(name: str, stock: Any, student: Any, inputs: Inputs) -> CheckResult:
    """The logits of a student of attention in all layers and those of the stock class, bit by bit.

    If they differ, the detail has the first text layer behind which hidden states do. A stock class
    that gives other logits in a second call is allowed twice its own difference.
    """
    expected, found = logits_of(stock, inputs), logits_of(student, inputs)
    shape = f"{inputs['input_ids'].shape[0]} x {inputs['input_ids'].shape[1]} tokens"
    if not bool(expected.isfinite().all()):
        return CheckResult(name, DIFFERENT, f"the stock class gives NaN or infinity ({shape})")
    if torch.equal(found, expected):
        return CheckResult(name, OK, f"equal, bit for bit ({shape})")
    largest = _largest(found, expected)
    own = _largest(logits_of(stock, inputs), expected)
    if largest <= 2 * own:
        return CheckResult(
            name,
            OK,
            f"differ by {largest:.2g}, as much as the stock class from itself in a second call "
            f"({own:.2g}; {shape})",
        )
    size = float(expected.double().abs().max())
    return CheckResult(
        name,
        DIFFERENT,
        f"largest difference of logits {largest:.3g}, largest logit {size:.3g} ({shape}); "
        f"{first_difference(stock, student, inputs)}",
    )


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max())


def first_difference(stock: Any, student: Any, inputs: Inputs) -> str:
    """Where in the text decoder the hidden states of two models differ first, as a phrase."""
    expected, found = _hidden_states(stock, inputs), _hidden_states(student, inputs)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if torch.equal(one, other):
            continue
        size = _largest(one, other)
        if index == 0:
            return f"the input of text layer 0 differs already (by {size:.3g})"
        return f"hidden states differ first behind text layer {index - 1} (by {size:.3g})"
    return "hidden states behind all text layers are equal, so the last norm or the head differs"


@torch.no_grad()
def _hidden_states(model: Any, inputs: Inputs) -> list[Tensor]:
    """The input of each text layer, and the output of the last, in one forward pass, on the CPU."""
    layers, found = text_decoder(model).layers, []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach().cpu())

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().cpu())

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        logits_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def compare_generation(
    name: str, stock: Any, student: Any, inputs: Inputs, tokens: int, suppressed: Sequence[int]
) -> CheckResult:
    """Greedy tokens of both models with a cache, and their logits, bit by bit."""
    expected, expected_logits = greedy_tokens(stock, inputs, tokens, suppressed)
    found, logits = greedy_tokens(student, inputs, tokens, suppressed)
    if torch.equal(found, expected) and torch.equal(logits, expected_logits):
        return CheckResult(name, OK, f"{tokens} tokens equal, their logits bit for bit")
    # Later steps have another context once a token differs.
    largest = _largest(logits[:, :1], expected_logits[:, :1])
    _, again_logits = greedy_tokens(stock, inputs, tokens, suppressed)
    own = _largest(again_logits[:, :1], expected_logits[:, :1])
    if not torch.equal(again_logits, expected_logits) and largest <= 2 * own:
        return CheckResult(
            name,
            OK,
            f"logits of the first token differ by {largest:.2g}, as much as those of the stock "
            f"class in a second call ({own:.2g})",
        )
    differing = (found != expected).any(0).nonzero()
    step = int(differing[0]) if differing.numel() else None
    said = (
        f"{tokens} tokens are equal"
        if step is None
        else f"token {step + 1} of {tokens} is {found[0, step]}, expected {expected[0, step]}"
    )
    return CheckResult(
        name, DIFFERENT, f"{said}; logits of the first token differ by {largest:.3g}"
    )


def cached_distance(model: Any, inputs: Inputs, tokens: int, suppressed: Sequence[int]) -> float:
    """Relative distance of the logits of greedy decoding with a cache and without.

    Steps behind the first different token have another context and are left out.
    """
    cached, logits = greedy_tokens(model, inputs, tokens, suppressed)
    uncached, expected = greedy_tokens(model, inputs, tokens, suppressed, use_cache=False)
    differing = (cached != uncached).any(0).nonzero()
    steps = int(differing[0]) + 1 if differing.numel() else tokens
    return relative_distance(logits[:, :steps], expected[:, :steps])


def padded_distance(model: Any, prompts: Prompts) -> float | None:
    """Largest relative distance of a row's last logits in a left-padded batch and alone."""
    if prompts.batch is None:
        return None
    together = logits_of(model, prompts.batch)[:, -1]
    return largest_error(
        relative_distance(together[index], logits_of(model, row)[0, -1])
        for index, row in enumerate(prompts.rows)
    )


def rounding_of(model: Any, prompts: Prompts, tokens: int, suppressed: Sequence[int]) -> Rounding:
    """How far a model is from itself with a cache, and in a batch."""
    return Rounding(
        cached_distance(model, prompts.richest, tokens, suppressed),
        padded_distance(model, prompts),
    )


def check_rounding(
    name: str, found: Rounding, own: Rounding | None, dtype: torch.dtype
) -> CheckResult:
    """Whether decoding with a cache and a padded batch change the logits of a model.

    `own` are the distances of the stock class where there is one: what it does not hold, a student
    need not hold either.
    """
    parts, fine = [], True
    compared = (
        ("with a cache", found.cached, None if own is None else own.cached),
        ("in a left-padded batch", found.padded, None if own is None else own.padded),
    )
    for what, distance, stock in compared:
        if distance is None:
            continue
        allowed = allowed_distance(dtype, stock or 0.0)
        # A distance of NaN is not fine.
        fine = fine and distance <= allowed
        beside = "" if stock is None else f" (stock class {stock:.1e})"
        parts.append(f"{what} {distance:.1e}{beside}, allowed {allowed:.1e}")
    return CheckResult(
        name, OK if fine else DIFFERENT, f"relative distance of logits: {'; '.join(parts)}"
    )
