"""Fixtures for all tests, and two things that must happen before anything is imported."""

import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

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


# On x86 processors without VNNI ONNX Runtime adds products of 8 bits in 16, which saturate: what it
# answers is then another number than the file says (docs/deployment.md), and these compare numbers.
SATURATING = (
    "test_bench_command.py::test_right_answers_pass",
    "test_bench_command.py::test_a_language_model_that_caches_is_timed",
    "test_equalized_models.py::test_an_equalized_model_is_exported",
    "test_experts.py::test_experts_are_exported_as_integers",
    "test_export_options.py::test_zero_points_are_ours[8-",
    "test_export_options.py::test_large_tensors_lie_beside_the_file",
    "test_export_options.py::test_training_mode_is_kept_and_dropout_is_not",
    "test_export_options.py::test_masks_and_labels_reach_the_file",
    "test_export_sizes.py::test_files_run_at_every_pair_of_lengths[two]",
    "test_verify.py::test_a_right_file_passes[('vit', {'bits': 8}, 'uint8')]",
    "test_verify.py::test_a_right_file_passes[('opt', {'bits': 8, 'symmetric': False}, 'uint8')]",
    "test_verify.py::test_a_right_file_passes[('shared', {'bits': 8}, 'uint8')]",
    "test_verify.py::test_a_right_file_passes[('swin', {'bits': 8, 'coverage': 'full'}, 'uint8')]",
    "test_verify.py::test_shares_are_those_that_numpy_counts[('vit', {'bits': 8}, 'uint8')]",
    "test_verify.py::test_a_wrong_scale_is_named",
    "test_verify.py::test_a_wrong_scale_on_the_way_back_is_named",
    "test_verify.py::test_a_weight_that_has_no_name_is_found_by_the_layer_behind_it",
    "test_verify.py::test_an_output_that_no_code_decides_is_compared",
    "test_verify.py::test_a_file_that_is_wrong_for_a_later_batch_fails",
    "test_verify.py::test_a_file_of_other_weights_fails",
    "test_verify.py::test_wide_sites_are_computed_in_float_and_not_compared",
    "test_verify_command.py::test_a_right_file_is_measured_and_passes",
    "test_verify_command.py::test_what_is_wrong_is_in_the_last_line[bert_case]",
)


def pytest_collection_modifyitems(items):
    from quanttune.inference.onnx_model import has_vnni

    if has_vnni() is not False:
        return
    mark = pytest.mark.skip(reason="products of 8 bits saturate on this processor: no VNNI")
    for item in items:
        if item.nodeid.rpartition("tests/")[2].startswith(SATURATING):
            item.add_marker(mark)


def pytest_collection_finish():
    """Keep the garbage collector from going again and again through all that was imported."""
    gc.freeze()


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
    """Return Digits with a model that is hardly trained, few rows and few ways to quantize."""
    from quanttune.recipes import digits

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
