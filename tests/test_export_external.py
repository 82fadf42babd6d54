"""A graph and the tensors beside it are replaced together; sizes count both."""

import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import quanttune as qt
from quanttune import files
from quanttune.deploy import external_data


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Return what writes a model, its tensors beside it, and what lies in the folder then."""
    monkeypatch.setattr(external_data, "LARGEST", 0)

    def write(seed=0, name="model.onnx"):
        torch.manual_seed(seed)
        x = torch.randn(4, 8)
        model = qt.quantize(nn.Sequential(nn.Linear(8, 64)), data=[x])
        qt.export_onnx(model, x, tmp_path / name, dynamic={})
        return sorted(path.name for path in tmp_path.iterdir())

    return write


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
@pytest.mark.parametrize("largest", [0, 1 << 30])
def test_killed_at_any_step_the_older_or_the_newer_is_there(largest, tmp_path):
    script = Path(__file__).with_name("killed_writes.py")
    command = [sys.executable, "-W", "ignore", script, tmp_path, str(largest)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *values, left = done.stdout.splitlines()
    assert len(values) > (8 if largest == 0 else 4)
    older = values.index("2.0")
    assert values == ["1.0"] * older + ["2.0"] * (len(values) - older)
    assert older > 3
    assert len(left.split()) == (1 if largest == 0 else 0)  # the name of the graph is cut off


def test_older_tensors_go_and_those_of_others_stay(exported, tmp_path):
    first = exported(0)
    assert exported(0) == first  # named after what is in it
    (tmp_path / "model.onnx.0123456789abcdef.data").write_bytes(b"of nobody that this graph names")
    second = exported(1)
    assert len(second) == 3
    assert set(first) & set(second) == {"model.onnx"}
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    shared = tmp_path / "weights.bin"
    (beside,) = external_data.tensor_files(tmp_path / "model.onnx")
    beside.rename(shared)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = shared.name if entry.key == "location" else entry.value
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    assert external_data.tensor_files(tmp_path / "model.onnx") == [shared]
    exported(2)
    assert shared.exists()


def test_a_small_file_takes_the_place_of_a_large_one(exported, tmp_path, monkeypatch):
    exported(0)
    monkeypatch.setattr(external_data, "LARGEST", 1 << 20)
    assert exported(1) == ["model.onnx"]


@pytest.mark.parametrize("when", ["older", "none"])
def test_an_error_leaves_what_was_there(when, exported, tmp_path, monkeypatch):
    before = exported(0) if when == "older" else []
    bytes_before = [(tmp_path / name).read_bytes() for name in before]

    def full(path):
        if path.suffix != ".data":
            raise OSError("no space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="no space"):
        exported(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [(tmp_path / name).read_bytes() for name in before] == bytes_before


def test_threads_write_one_file_at_a_time(tmp_path):
    """Each writes its own to the end; one of them is there afterwards, whole."""
    barrier, errors = threading.Barrier(4), []

    def write(number):
        try:
            for _ in range(10):
                barrier.wait(timeout=60)
                with files.replacing(tmp_path / "file") as partial:
                    partial.write_text("")
                    barrier.wait(timeout=60)
                    partial.write_text(f"{number}" * 1000)
        except (OSError, threading.BrokenBarrierError) as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    text = (tmp_path / "file").read_text()
    assert text in {f"{number}" * 1000 for number in range(4)}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
