"""Programs for ExecuTorch multiply integers in XNNPACK, and answer what the model simulates."""

import importlib

import pytest
import torch
from conftest import ROOT
from models import shallow
from torch import nn

import quanttune as qt

pytest.importorskip("executorch", reason="make runtimes")
pytestmark = pytest.mark.filterwarnings("ignore")  # of ExecuTorch and of torchao, of themselves


@pytest.fixture
def lowered(monkeypatch):
    """Return what lowers a program, and counts its products."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.deploy.edge_programs").ExecuTorch


@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_all_weights_are_multiplied_as_integers(name, lowered):
    example = shallow(name)
    model = example.model.eval()
    exact = example.logits()
    qt.quantize(model, coverage="full", data=[example.inputs])
    program = lowered(qt.export_torch(model, example.inputs, target="executorch"))
    assert not program.left
    assert program.integer == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())
    expected = example.logits()
    error = (program(example.inputs) - expected).abs().mean()
    assert error < (exact - expected).abs().mean() / 3
    one = torch.nn.functional.cosine_similarity(program(example.inputs), expected)
    assert one.min() > 0.995


@torch.no_grad()
def test_codes_are_those_of_the_simulation(lowered):
    """A Linear alone, whose codes can be read from what it returns: within 1, nearly all equal."""
    model, rows = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(256, 64)
    qt.quantize(model, coverage="full", data=[rows])
    program = lowered(qt.export_torch(model, rows, target="executorch"))
    steps = (program(rows) - model(rows)) / model[0].output_quantizer.scale
    assert steps.abs().max() < 1.001
    assert (steps.abs() > 0.5).float().mean() < 0.001
