"""Device and fixtures of the Triton tests: a GPU, or the CPU with TRITON_INTERPRET=1.

Test modules that import this one are skipped if neither is available.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from ops_cases import relative_error
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = triton.knobs.runtime.interpret and not torch.cuda.is_available()
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
# Relative errors by 2-norm, those of `mmmamba doctor`.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialized buffers are filled with NaN, so that unwritten elements are detected."""
    plain = torch.empty

    def poisoned(*shape, **options):
        made = plain(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def faithful_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fixes for Triton 3.6's interpreter, whose arithmetic differs from a GPU's.

    It truncates to bf16 instead of rounding, multiplies the bits of bf16 tiles as integers, and
    calls `int` on arrays of one element, which NumPy 2.4 rejects.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_dot, plain_cast, plain_patch = (
        builder.create_dot,
        builder.cast_impl,
        interpreter._patch_lang_tensor,
    )

    def upcast(tile):
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        bits = np.ascontiguousarray(tile.data).astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def cast(self, source, to):
        if to.scalar == tl.float32 and source.dtype.scalar == tl.bfloat16:
            return upcast(source)
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            quiet = np.where(np.isnan(source.data), 0x7FC0, rounded)
            return handle(quiet.astype(np.uint16), tl.bfloat16)
        return plain_cast(self, source, to)

    def dot(self, a, b, *rest):
        return plain_dot(self, upcast(a), upcast(b), *rest)

    def patch(tensor, scope):
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    # Masked exponentials overflow as on a GPU, which does not warn.
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def check(
    call: Callable,
    tensors: dict[str, Tensor],
    tolerance: float,
    *,
    reference: str = "reference",
    scattered: bool = False,
    **options: object,
) -> None:
    """Compare `call(**tensors, **options)` on kernels with the reference in fp64, and gradients.

    With `scattered`, inputs and output gradients are non-contiguous in every dimension.
    """
    found = {n: t.to(DEVICE).clone().requires_grad_() for n, t in tensors.items()}
    given = {n: _scattered(t) for n, t in found.items()} if scattered else found
    wanted = {n: t.detach().cpu().double().requires_grad_() for n, t in tensors.items()}
    here = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in options.items()}
    outputs = _listed(call(**given, **here, backend="triton"))
    expected = _listed(call(**wanted, **options, backend=reference))
    assert len(outputs) == len(expected)
    rng = torch.Generator().manual_seed(9)
    # Rounded to the outputs' dtype, so that both sides get equal output gradients.
    weights = [torch.randn(o.shape, generator=rng).to(o.dtype).double() for o in outputs]
    there = [w.to(DEVICE) for w in weights]
    if scattered:
        outputs = [_scattered(o) for o in outputs]
    sum((o.double() * w).sum() for o, w in zip(outputs, there, strict=True)).backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    for place, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert relative_error(a.cpu(), b) < tolerance, f"output {place}"
        if "mask" in options and a.shape[:2] == options["mask"].shape:
            assert (a.cpu()[~options["mask"]] == 0).all()
    for name, tensor in found.items():
        assert tensor.grad.dtype == tensor.dtype
        assert relative_error(tensor.grad.cpu(), wanted[name].grad) < tolerance, name


def _listed(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _scattered(tensor: Tensor) -> Tensor:
    """The same values with reversed memory order, and NaN between neighbours."""
    order = tuple(reversed(range(tensor.dim())))
    turned = tensor.permute(order).contiguous().permute(order)
    return torch.stack((turned, torch.full_like(turned, torch.nan)), dim=-1)[..., 0]
