"""Files of int8 in tract, a runtime in Rust: the simulation's answers."""

import pytest
import torch
from models import shallow

import quanttune as qt

tract = pytest.importorskip("tract", reason="make runtimes")


@pytest.mark.parametrize("shapes", [{0: "batch"}, {}], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_tract_computes_the_simulation(name, shapes, tmp_path):
    """It takes codes for values in a softmax that is rounded before and behind, but for the Max."""
    example = shallow(name)
    qt.quantize(example.model, coverage="full", data=[example.inputs])
    path = tmp_path / "model.onnx"
    qt.export_onnx(example.model, example.inputs, path, act_dtype="int8", dynamic=shapes)
    program = tract.onnx().load(str(path)).into_model().into_runnable()
    logits = torch.from_numpy(program.run([example.inputs.numpy()])[0].to_numpy().copy())
    torch.testing.assert_close(logits, example.logits(), rtol=0, atol=1e-5)
