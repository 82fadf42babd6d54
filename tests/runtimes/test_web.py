"""Files in onnxruntime-web, as a browser runs them: the answers of ONNX Runtime."""

import shutil

import pytest
import torch
from conftest import ROOT
from models import shallow

import quanttune as qt
from quanttune.deploy.onnx_model import OnnxModel

WEB = ROOT / "build" / "web"  # make runtimes
ready = shutil.which("node") and (WEB / "node_modules" / "onnxruntime-web").is_dir()
pytestmark = pytest.mark.skipif(not ready, reason="make runtimes")


@pytest.mark.parametrize("act_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_a_browser_gives_the_answers_of_onnx_runtime(name, act_dtype, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.deploy.web_file import answers

    example = shallow(name)
    qt.quantize(example.model, coverage="full", data=[example.inputs])
    path = tmp_path / "model.onnx"
    qt.export_onnx(example.model, example.inputs, path, act_dtype=act_dtype)
    native = OnnxModel(path)
    (expected,) = native(example.inputs).values()
    found, _ = answers(path, {native.inputs[0]: example.inputs}, WEB)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
