"""The ops as PyTorch sees them: schemas, shapes without data, torch.compile, missing backends."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from quanttune import backends, fake_quant, fused_observer

OPS = torch.ops.quanttune
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

TENSORS = {
    "contiguous": lambda: torch.randn(4, 33),
    "transposed": lambda: torch.randn(33, 4).t(),
    "bfloat16": lambda: torch.randn(4, 33).bfloat16(),
    "float64": lambda: torch.randn(4, 33, dtype=torch.float64),
    "channels last": lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 33).expand(4, 33),
    "one element": lambda: torch.randn(4, 1),
}


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kind", TENSORS)
def test_opcheck_of_fake_quant(kind, axis):
    x, grad = TENSORS[kind](), TENSORS[kind]()
    grid = torch.rand(1 if axis is None else x.shape[axis]) + 0.1, -8, 7, axis
    torch.library.opcheck(OPS.fake_quant.default, (x, *grid))
    torch.library.opcheck(OPS.fake_quant_backward.default, (grad, x, *grid))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("kind", TENSORS)
def test_opcheck_of_outlier_statistics(kind, flag):
    x, grad = TENSORS[kind](), TENSORS[kind]()
    torch.library.opcheck(OPS.outlier_statistics.default, (x, 2, flag))
    statistics = OPS.outlier_statistics(x, 2, flag)
    arguments = grad, x, statistics, torch.tensor([1.0, 2.0]), flag, not flag
    torch.library.opcheck(OPS.outlier_statistics_backward.default, arguments)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_without_data(dtype, kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x = torch.empty(5, 4, 6, dtype=dtype).transpose(0, 2)
        y = fake_quant(x, torch.empty(6), axis=0)
        grad = OPS.fake_quant_backward(y, x, torch.empty(6), -8, 7, 0)
        statistics = OPS.outlier_statistics(x, 3, False)
        total = OPS.outlier_statistics_backward(y, x, statistics, torch.empty(3), False, False)
        observed, columns = fused_observer.observe(x, 2)
    for tensor in (y, grad, total):
        assert (tensor.shape, tensor.dtype, tensor.stride()) == ((6, 4, 5), dtype, (20, 5, 1))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert (statistics.shape, statistics.dtype) == ((3, 7), wanted)
    assert (observed.shape, observed.stride()) == (x.shape, x.stride())
    assert [(column.shape, column.dtype) for column in columns] == [((2,), wanted)] * 5


def compiled_and_eager(function, *arguments):
    """Return the results and the gradients of the first argument, compiled and eager."""
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        x = arguments[0].detach().requires_grad_()
        y = run(x, *arguments[1:])
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    return results


@pytest.mark.parametrize("axis", [None, 1])
def test_compiled_fake_quant(axis):
    def function(x, scale):
        return fake_quant(x * 2, scale, bits=4, axis=axis) + x

    scale = torch.full((1 if axis is None else 33,), 0.1)
    for x in (torch.randn(5, 33), torch.randn(33, 5).t()):
        compiled, eager = compiled_and_eager(function, x, scale)
        assert all(map(torch.equal, compiled, eager))


@pytest.mark.parametrize("options", [{}, {"samples": 3, "exact": True, "detach_deviation": True}])
@pytest.mark.parametrize("name", ["outlier_ratio", "observe"])
def test_compiled_observer(name, options):
    def function(x):
        if name == "outlier_ratio":
            return fused_observer.outlier_ratio(x * 2, **options)
        y, observed = fused_observer.observe(x * 2, **options)
        return y * observed.ratio.mean() + observed.maximum.sum()

    for x in (torch.randn(6, 5, 33), torch.randn(5, 6, 33).transpose(0, 1)):
        for compiled, eager in zip(*compiled_and_eager(function, x), strict=True):
            # sums run in the order of the memory, which may differ
            assert ((compiled - eager).abs() <= 1e-6 * eager.abs().max()).all()


def test_compiled_for_any_batch_size():
    run = torch.compile(
        fused_observer.outlier_ratio, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for samples in (3, 5, 8):
        x = torch.randn(samples, 7, 11)
        assert torch.equal(run(x), fused_observer.outlier_ratio(x))


def test_compiled_modules():
    observer = fused_observer.FusedObserver()
    compiled, eager = compiled_and_eager(
        lambda x: observer(x).sum() + observer.ratio, torch.randn(3, 9)
    )
    assert all(map(torch.equal, compiled, eager))


def test_backends():
    served = backends()
    assert list(served) == ["cpu", "cuda", "other"]
    assert served["cpu"] == ("C++", "the extension is built")
    assert served["cuda"].name in ("Triton", "reference")
    assert served["other"] == ("reference", "no kernels for other devices")


# Runs where a module cannot be imported; prints one line for each thing that is then checked.
PROBE = """
import sys, warnings
sys.modules[{blocked!r}] = None
import torch
torch.version.cuda = {cuda!r}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import quanttune
    import quanttune.fused_observer
    import quanttune.ops
    quanttune.backends()
x = torch.tensor([[1.0, -2, 3, -10]], requires_grad=True)
print(quanttune.fake_quant(x, torch.tensor(1.0), bits=3).tolist())
y, observed = quanttune.fused_observer.observe(x)
(y.sum() + observed.ratio.sum()).backward()
print(f"{{observed.ratio.item():.6f}} {{(x.grad - 1).mul(x).sum().abs().item():.6f}}")
print(torch.ops.quanttune.outlier_statistics(x, 2, False).shape)
print(*[backend.name for backend in quanttune.backends().values()])
for backend in ("cpu", "cuda"):
    print(quanttune.backends()[backend].reason)
for warning in caught:
    print("WARNING", warning.category.__name__, warning.message)
"""

SLOW = "take the slower PyTorch reference."
HALTED = "halted; None in sys.modules"
NO_EXTENSION = f"the C++ extension does not load: import of quanttune._C {HALTED}"
NO_TRITON = f"Triton does not load: import of triton {HALTED}"
BROKEN = {
    "extension": (
        ("quanttune._C", "12.8"),
        "reference Triton reference",
        [NO_EXTENSION, "Triton is installed"],
        [f"{NO_EXTENSION}. CPU tensors {SLOW} `quanttune doctor` has the remedy."],
    ),
    "triton": (
        ("triton", "12.8"),
        "C++ reference reference",
        ["the extension is built", NO_TRITON],
        [f"{NO_TRITON}. GPU tensors {SLOW} pip install triton mends it."],
    ),
    "triton without a GPU": (
        ("triton", None),
        "C++ reference reference",
        ["the extension is built", NO_TRITON],
        [],
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_missing_backend_is_said_once_and_replaced(broken, tmp_path):
    if broken == "extension":
        pytest.importorskip("triton", reason="the probe names Triton as the GPU's backend")
    (blocked, cuda), names, reasons, messages = BROKEN[broken]
    command = [sys.executable, "-c", PROBE.format(blocked=blocked, cuda=cuda)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[[1.0, -2.0, 3.0, -4.0]]",
        "1.399708 0.000000",
        "torch.Size([2, 7])",
        names,
        *reasons,
        *(f"WARNING UserWarning {message}" for message in messages),
    ]
