"""The installed package: what is in it, and what importing it does to the process."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
from scripts import run

import quanttune

PACKAGE = Path(quanttune.__file__).resolve().parent
OPS = {
    "dynamic_fake_quant",
    "fake_quant",
    "fake_quant_backward",
    "outlier_statistics",
    "outlier_statistics_backward",
    "quantization_errors",
}


def test_the_extension_is_built_and_needs_no_torch():
    spec = importlib.util.find_spec("quanttune._C")
    assert spec is not None
    extension = Path(spec.origin)
    assert extension.parent == PACKAGE
    assert set(dir(importlib.import_module("quanttune._C"))) >= OPS
    for library in (b"libtorch", b"libc10"):
        assert library not in extension.read_bytes()


def test_the_triton_kernels_live_below_the_package():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    kernels = importlib.import_module("quanttune.triton_kernels")
    assert set(dir(kernels)) >= OPS
    installed = importlib.metadata.files("quanttune")
    assert not [path for path in installed if path.parts[0] == "triton_kernels"]
    # another project's, if there is one at all
    top_level = importlib.util.find_spec("triton_kernels")
    assert top_level is None or top_level.origin != kernels.__file__


STATE = """
import os, random, sys, warnings
import numpy, threadpoolctl, torch

def runtimes():
    return sorted(info["filepath"] for info in threadpoolctl.threadpool_info()
                  if info["user_api"] == "openmp")

def state():
    return {
        "threads": torch.get_num_threads(),
        "runtimes": runtimes(),
        "torch random": torch.get_rng_state().tolist(),
        "python random": random.getstate(),
        "numpy random": str(numpy.random.get_state()),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "subnormals": [sys.float_info.min / 2, torch.tensor(1e-40).mul(0.5).item()],
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }

torch.set_num_threads(3)
torch.ones(1 << 20).add(1)
before = state()
assert before["subnormals"][0] > 0 and before["subnormals"][1] > 0
import quanttune
after_import = state()
x = torch.ones(4, 1 << 16, requires_grad=True)
after_import["torch random"] = before["torch random"]
y, observed = quanttune.fused_observer.observe(x)
quanttune.fake_quant(y, torch.tensor(0.1)).sum().backward()
for name, value in state().items():
    print(name, value == before[name] == after_import[name])
print("OpenMP", len(before["runtimes"]))
"""


def test_importing_and_running_leaves_the_process_as_it_was(tmp_path):
    pytest.importorskip("threadpoolctl", reason="it lists the OpenMP runtimes of a process")
    *unchanged, runtimes = run(STATE, tmp_path)
    assert len(unchanged) == 10
    assert [line for line in unchanged if not line.endswith(" True")] == []
    assert runtimes == "OpenMP 1"


FORKS = """
import multiprocessing, torch, quanttune
ops = torch.ops.quanttune

def work(data):
    # ops of ours alone: the threads of PyTorch's are just as dead in a forked child
    columns = ops.outlier_statistics(data, 4, False)
    grad = ops.outlier_statistics_backward(data, data, columns, torch.ones(4), False, False)
    y = ops.fake_quant(data, torch.tensor(0.1), -8, 7, None)
    return [hash(tensor.numpy().tobytes()) for tensor in (columns, grad, y)]

torch.set_num_threads(2)
data = torch.linspace(-3, 3, 1 << 20).reshape(4, -1)
{before_the_fork}
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
children = [context.Process(target=lambda: queue.put(work(data))) for _ in range(5)]
for process in children:
    process.start()
for process in children:
    process.join(20)
    print("ended" if process.exitcode == 0 else f"hangs or failed: {{process.exitcode}}")
    process.kill()
results = [queue.get() for process in children if process.exitcode == 0]
print(results == 5 * [work(data)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("before_the_fork", ["work(data)", "data.mul(2)"])
def test_forked_children_work_alone(before_the_fork, tmp_path):
    script = FORKS.format(before_the_fork=before_the_fork)
    assert run(script, tmp_path) == ["ended"] * 5 + ["True"]
