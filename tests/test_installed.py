"""The installed package: what is in it, and what importing it does to the process."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from scripts import run

import quanttune
from quanttune import ops

PACKAGE = Path(quanttune.__file__).resolve().parent
OPS = {
    "dynamic_fake_quant",
    "fake_quant",
    "fake_quant_backward",
    "outlier_statistics",
    "outlier_statistics_backward",
    "quantization_errors",
}


def test_the_extension_is_built_and_needs_neither_torch_nor_openmp():
    spec = importlib.util.find_spec("quanttune._C")
    assert spec is not None
    extension = Path(spec.origin)
    assert extension.parent == PACKAGE
    assert set(dir(importlib.import_module("quanttune._C"))) >= OPS
    for library in (b"libtorch", b"libc10", b"libgomp", b"libomp", b"libiomp"):
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
from quanttune import ops
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


WITHOUT_A_SHARED_RUNTIME = """
import ctypes, os

open_library = ctypes.CDLL.__init__
def open_for_itself(library, name, mode=ctypes.RTLD_LOCAL, **others):
    open_library(library, name, ctypes.RTLD_LOCAL, **others)
ctypes.CDLL.__init__ = open_for_itself
import threadpoolctl, torch
print(hasattr(ctypes.CDLL(None), "GOMP_parallel"))
import quanttune
from quanttune import ops

print(quanttune.backends()["cpu"].reason)
torch.set_num_threads(1)
x = torch.ones(1 << 20)
torch.set_num_threads(3)
counts = [len(os.listdir("/proc/self/task"))]
for work in (lambda: torch.ops.quanttune.fake_quant(x, torch.tensor(0.1), -8, 7, None), x.exp):
    work()
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0], counts[2] - counts[1])  # two more threads of ours, which torch takes
print([info["user_api"] for info in threadpoolctl.threadpool_info()].count("openmp"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux lists them")
def test_the_threads_of_torch_are_found_where_its_loader_keeps_them_to_itself(tmp_path):
    pytest.importorskip("threadpoolctl", reason="it lists the OpenMP runtimes of a process")
    said = run(WITHOUT_A_SHARED_RUNTIME, tmp_path)
    assert said == ["False", "the extension is built", "2 0", "1"]


def test_without_openmp_the_kernels_work_alone_and_say_so(monkeypatch, with_threads):
    cpu = pytest.importorskip("quanttune.cpu", reason="the extension is not built")
    with_threads(3)
    x = torch.randn(3, 1 << 18)
    expected = torch.ops.quanttune.outlier_statistics(x, 3, True)
    cpu._C.set_openmp(0, 0, 0)
    try:
        assert torch.equal(torch.ops.quanttune.outlier_statistics(x, 3, True), expected)
    finally:
        assert cpu.share_openmp(cpu._C)
    monkeypatch.setattr(cpu, "_OPENMP", ("no_such_function",))
    assert not cpu.share_openmp(cpu._C)
    monkeypatch.setattr(cpu, "HAS_OPENMP", False)
    name, reason = ops._load_cpu()[1]
    assert name == "C++"
    assert "one thread, since this PyTorch has no OpenMP" in reason
