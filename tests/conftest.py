"""Fixtures for all tests, and two things that must happen before anything is imported."""

import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from slow import mark

# Test the installed package, never the checkout that happens to be the working directory.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def python_files(folder, below=Path()):
    """Return the Python files of a folder, under the names that they have when installed."""
    return {below / path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.py")}


def pytest_configure():
    """Refuse to test a package that is not of this checkout: neither here, nor a wheel of it."""
    spec = importlib.util.find_spec("quanttune")
    if spec is None:
        raise pytest.UsageError(
            "quanttune is not installed: make test, or pip install -e '.[test]'"
        )
    package, installed = ROOT / "quanttune", Path(spec.origin).resolve().parent
    kernels = python_files(ROOT / "triton_kernels", Path("triton_kernels"))
    if installed != package and python_files(installed) != python_files(package) | kernels:
        raise pytest.UsageError(
            f"the tests of {ROOT} would run on {installed}, which has other Python files than this "
            f"checkout. Install this one: pip install -e {ROOT}"
        )


# Without a GPU the Triton kernels still run, one program at a time, on CPU tensors.
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# inductor would try each instruction set of the processor in a program and a Python of its own
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"


# these take longest, and are begun first: else one process would be left with them at the end
LONGEST = ("wheel", "ahead_of_time", "sharded", "cpu_kernels", "export_sizes", "bench_command")


@pytest.hookimpl(tryfirst=True)  # before those with the mark are left out
def pytest_collection_modifyitems(items, config):
    mark(items, complete=config.args_source is pytest.Config.ArgsSource.TESTPATHS)
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def pytest_collection_finish():
    """Keep the garbage collector from going again and again through all that was imported."""
    gc.freeze()
    read_once()


def read_once():
    """Let torch look its operators up, and their sources, in the first export and not in each."""
    from onnxscript._internal import values
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration, _schemas

    operators, traced = _registration.onnxscript_apis, values.TracedOnnxFunction
    for owner, name in (
        (operators, "get_torchlib_ops"),
        (_schemas, "op_signature_from_function"),
        (utils, "_materialize_cpp_cia_ops"),
    ):
        setattr(owner, name, functools.cache(getattr(owner, name)))
    traced.function_ir = property(functools.cache(traced.function_ir.fget))


def pytest_sessionfinish():
    gc.unfreeze()  # else libraries call it a leak


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory(monkeypatch):
    """Let torch.empty hand out NaN, so that an output element nobody wrote fails the test."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_digits(monkeypatch):
    """Return Digits with a small model, hardly trained, few rows and few ways to quantize."""
    from quanttune.demo import digits

    whole = digits._vit

    def of_two_blocks():
        model = whole()
        del model.blocks[2:]
        return model

    monkeypatch.setattr(digits, "_vit", of_two_blocks)

    for name in ("PRETRAIN_STEPS", "INFLATE_STEPS"):
        monkeypatch.setattr(digits, name, 3)
    monkeypatch.setattr(digits, "TEST", 100)
    calibration = digits.Digits.calibration
    monkeypatch.setattr(digits.Digits, "calibration", lambda self: calibration(self)[:2])
    monkeypatch.setattr(digits.Digits, "steps", 2)
    monkeypatch.setattr(digits.Digits, "bits", (8, 5))
    ways = {"minmax": ("channel", "tensor"), "percentile": ("channel",)}
    monkeypatch.setattr(digits.Digits, "ways", ways)
    return digits.Digits


@pytest.fixture
def with_threads():
    """Set the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def bert(tmp_path, cache):
    """Return the folder of a BERT without dropout, for 5 labels."""
    from cases import save_tokenizer
    from models import MODELS

    MODELS["bert"]().model.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def command(bert, tmp_path):
    """Return the arguments of a run that works."""
    from cases import write_csv

    rows = [(f"w{i} w1", i % 5) for i in range(8)]
    write_csv(tmp_path / "data.csv", ("text", "label"), rows)
    return [
        str(bert), "--data", str(tmp_path / "data.csv"), "--out", str(tmp_path / "run"),
        "--steps", "2", "--batch-size", "4",
    ]  # fmt: skip
