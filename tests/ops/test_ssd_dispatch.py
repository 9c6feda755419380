"""Selection of the scan backend by `auto`: order, capability limits and self-test."""

import warnings

import pytest
import torch
from library_stubs import none_imported, pretend_gpu
from ops_cases import make_scan, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mmmamba_cli.ops import dispatch, ssd
from mmmamba_cli.ops.dispatch import LENGTH, TOLERANCES, SelfTest, passes
from mmmamba_cli.ops.ssd import SCAN_BACKENDS, reference
from mmmamba_cli.ops.ssd.dispatch import PROBLEM

BF16, FP32 = torch.bfloat16, torch.float32
FUSED = ("triton", "mamba_ssm", "fla")


class Stand:
    """A fused backend: the reference with a record of its calls and, optionally, a fault."""

    def __init__(self, fault=None):
        self.lengths = []
        self.fault = fault

    def __call__(self, inputs):
        self.lengths.append(inputs.x.shape[1])
        y, state = reference.chunked(inputs)
        return (y, state) if self.fault is None else self.fault(y, state)

    @property
    def trials(self):
        return self.lengths.count(LENGTH)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def wrong_y(y, state):
    return y * 1.1, state


def wrong_state(y, state):
    return y, state * 1.1


def nan(y, state):
    return y * torch.nan, state


def fails(y, state):
    raise RuntimeError("no kernel image is available\nand more")


def wrong_gradient(y, state):
    return WrongGradient.apply(y), state


@pytest.fixture(autouse=True)
def stands(monkeypatch):
    with none_imported():
        pretend_gpu(monkeypatch)
        made = {name: Stand() for name in FUSED}
        for name, stand in made.items():
            monkeypatch.setitem(SCAN_BACKENDS, name, stand)
        yield made


def run(length=7, dtype=BF16, trains=False, **options):
    scan = make_scan(0, length=length, value_dim=16, state_dim=16).to(dtype)
    if trains:
        scan = scan.with_gradients()
    return ssd(**scan.tensors(), dt_softplus=True, **options)


def taken(stands, **options):
    """The name of the backend that computed the result; "chunked" if no fused one did."""
    before = {name: len(stand.lengths) for name, stand in stands.items()}
    run(**options)
    new = {name: stand.lengths[before[name] :] for name, stand in stands.items()}
    (name,) = [n for n, lengths in new.items() if 7 in lengths] or ["chunked"]
    return name


def passed_over(stands, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = taken(stands, **options)
    return name, [str(warning.message) for warning in caught]


def test_auto_uses_the_fastest_backend_that_supports_the_inputs(stands, monkeypatch):
    packing = torch.arange(7).expand(2, 7) // 4
    assert taken(stands) == "triton"
    monkeypatch.delitem(SCAN_BACKENDS, "triton")
    assert taken(stands) == "mamba_ssm"
    assert taken(stands, trains=True) == "mamba_ssm"
    assert taken(stands, seq_idx=packing) == "mamba_ssm"
    monkeypatch.delitem(SCAN_BACKENDS, "mamba_ssm")
    assert taken(stands) == "fla"
    assert taken(stands, trains=True) == "chunked"
    assert taken(stands, seq_idx=packing) == "chunked"
    assert taken(stands, dtype=FP32) == "chunked"
    monkeypatch.delitem(SCAN_BACKENDS, "fla")
    assert taken(stands) == "chunked"


def test_one_self_test_per_dtype_with_and_without_gradients(stands):
    for _ in range(3):
        run()
    assert stands["triton"].trials == 1
    run(trains=True)
    run(trains=True)
    assert stands["triton"].trials == 2
    run(dtype=FP32)
    run(dtype=torch.float16)
    assert stands["triton"].trials == 4
    assert stands["mamba_ssm"].lengths == stands["fla"].lengths == []


def test_no_self_test_for_fewer_than_two_tokens(stands):
    run(length=1)
    run(length=0)
    assert stands["triton"].lengths == []


def test_no_self_test_on_a_cpu(stands, monkeypatch):
    monkeypatch.undo()
    for name, stand in stands.items():
        monkeypatch.setitem(SCAN_BACKENDS, name, stand)
    assert taken(stands) == "chunked"
    assert all(stand.lengths == [] for stand in stands.values())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (wrong_y, "where its y is off by 0.1, allowed is 0.01"),
        (wrong_state, "where its state is off by 0.1, allowed is 0.01"),
        (nan, "where its y is off by nan, allowed is 0.01"),
        (fails, "where it fails: RuntimeError: no kernel image is available."),
    ],
)
def test_wrong_backend_is_skipped_with_one_warning(stands, fault, said):
    stands["triton"].fault = fault
    name, (message,) = passed_over(stands)
    assert name == "mamba_ssm"
    assert message.startswith("ssd: auto passes over the triton backend in bfloat16 on cpu, ")
    assert said in message and "`mmmamba doctor`" in message
    # The result is cached: no second self-test and no second warning.
    assert passed_over(stands) == ("mamba_ssm", [])
    assert stands["triton"].lengths == [LENGTH]


def test_wrong_gradient_matters_only_with_gradients(stands):
    stands["triton"].fault = wrong_gradient
    assert passed_over(stands) == ("triton", [])
    name, (message,) = passed_over(stands, trains=True)
    assert name == "mamba_ssm" and "its gradient of x is off by" in message
    assert passed_over(stands) == ("triton", [])


def test_reference_is_used_if_all_backends_are_wrong(stands):
    for stand in stands.values():
        stand.fault = wrong_y
    name, messages = passed_over(stands)
    assert name == "chunked" and len(messages) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run()[0], run(backend="chunked")[0])


def test_out_of_memory_is_not_a_failed_self_test(stands):
    def full(y, state):
        raise torch.OutOfMemoryError("full")

    stands["triton"].fault = full
    with pytest.raises(torch.OutOfMemoryError):
        run()
    stands["triton"].fault = None
    assert taken(stands) == "triton"


def test_self_test_has_no_side_effects(stands):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        y, _ = run()
        assert y.is_inference() and torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        run(dtype=FP32)
        assert not torch.is_grad_enabled()
    tensors = make_scan(0, length=7).to(torch.float16).tensors()
    with torch.device("meta"):
        ssd(**tensors, backend="auto")
    assert stands["triton"].trials == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_self_test_under_activation_checkpointing(stands, reentrant):
    scan = make_scan(0, dtype=FP32).with_gradients()
    tensors = scan.tensors()

    def forward(*given):
        named = dict(zip(tensors, given, strict=True))
        return ssd(**named, dt_softplus=True)[0]

    checkpoint(forward, *tensors.values(), use_reentrant=reentrant).sum().backward()
    plain = make_scan(0, dtype=FP32).with_gradients()
    ssd(**plain.tensors(), dt_softplus=True, backend="chunked")[0].sum().backward()
    assert stands["triton"].trials == (2 if reentrant else 1)
    for name, gradient in scan.gradients().items():
        assert relative_error(gradient, plain.gradients()[name]) < 1e-5, name


def test_no_self_test_while_tracing_or_capturing(stands, monkeypatch):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        assert taken(stands) == "triton"
    assert stands["triton"].trials == 0
    cuda = SelfTest("ssd", "triton", "cuda:0", BF16, False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert passes(cuda, stands["triton"], PROBLEM) and stands["triton"].trials == 0
    # A cached result still applies.
    monkeypatch.setitem(dispatch._results, cuda, False)
    assert not passes(cuda, stands["triton"], PROBLEM)
    assert taken(stands) == "triton"
    assert stands["triton"].trials == 1


def test_backend_selection_compiles(stands):
    scan = make_scan(0, dtype=FP32).tensors()
    compiled = torch.compile(
        lambda **t: ssd(**t, dt_softplus=True), backend="eager", fullgraph=True
    )
    y, _ = compiled(**scan)
    assert relative_error(y, ssd(**scan, dt_softplus=True, backend="chunked")[0]) < 1e-6
    assert stands["triton"].trials == 0


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("trains", [False, True])
def test_reference_passes_the_self_test(dtype, trains):
    test = SelfTest("ssd", "triton", "cpu", dtype, trains)
    assert dispatch._failure(test, reference.chunked, PROBLEM) is None
