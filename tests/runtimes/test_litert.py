"""Programs for LiteRT multiply integers in it, and answer what the model simulates."""

import importlib
from functools import partial

import pytest
import torch
from conftest import ROOT
from models import shallow
from torch import nn

import quanttune as qt

pytest.importorskip("litert_torch", reason="make runtimes")
pytestmark = pytest.mark.filterwarnings("ignore")  # of litert-torch and of torchao, of themselves


@pytest.fixture
def loaded(monkeypatch):
    """Return what converts a program and loads it, with LiteRT's own kernels.

    What XNNPACK computes of a ViT is further from the codes (docs/deployment.md).
    """
    monkeypatch.syspath_prepend(ROOT)
    made = importlib.import_module("benchmarks.deploy.edge_programs").LiteRT
    return partial(made, is_integer=True, own_kernels=True)


@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_all_weights_are_multiplied_as_integers(name, loaded):
    example = shallow(name)
    model = example.model.eval()
    exact = example.logits()
    qt.quantize(model, coverage="full_no_softmax", data=[example.inputs])
    program = qt.export_torch(model, example.inputs, target="litert")
    found = loaded(program, example=example.inputs)
    weights = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in model.modules())
    assert found.integer >= weights
    expected, answered = example.logits(), found(example.inputs)
    assert (answered - expected).abs().mean() < (exact - expected).abs().mean() / 2
