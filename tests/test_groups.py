"""Weights in groups of inputs that share a scale, and models that round weights alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import quanttune as qt
from quanttune.quantization.requantization import requantize

SIZE = 8


def by_hand(weight, bits, size=SIZE):
    """Round a weight (outputs, inputs), in float32 as numpy does."""
    rows = weight.numpy().reshape(-1, size)
    top = 2 ** (bits - 1) - 1
    scale = np.abs(rows).max(1, keepdims=True) / np.float32(top)
    scale[scale == 0] = 1
    return torch.from_numpy((np.rint(rows / scale) * scale).reshape(weight.shape))


def weight_only(model, x, bits=4, **options):
    options = {"coverage": "weight_only", "weights": SIZE, **options}
    return qt.quantize(model, weight_bits=bits, data=[x], **options)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Conv1D(6, 24)

    def forward(self, x):
        return self.layer(x)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5)).eval()


@pytest.mark.parametrize("bits", [3, 4])
def test_each_group_has_a_scale_and_inputs_stay_float(bits):
    model, x = small(), torch.randn(3, 24)
    model[0].weight.data[2, 8:16] = 0
    first, last = (by_hand(model[i].weight.detach(), bits) for i in (0, 2))
    hidden = nn.functional.gelu(x @ first.T + model[0].bias)
    expected = hidden @ last.T + model[2].bias
    torch.testing.assert_close(weight_only(model, x, bits)(x), expected)
    sites = qt.summary(model).sites
    assert [(site.name, site.granularity) for site in sites] == [
        ("0.weight_quantizer", "group"),
        ("2.weight_quantizer", "group"),
    ]


def test_groups_of_a_transposed_weight_lie_along_its_inputs():
    model, x = Transposed(), torch.randn(3, 24)
    weight = by_hand(model.layer.weight.detach().T.contiguous(), 4)
    torch.testing.assert_close(weight_only(model, x)(x), x @ weight.T + model.layer.bias)


def test_convolutions_and_embeddings_have_a_scale_per_channel():
    model = nn.Sequential(nn.Embedding(7, 9), nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(28, 3))
    ids = torch.randint(7, (2, 5))
    qt.quantize(model, weight_bits=4, coverage="linear_embedding", weights=7, data=[ids])
    found = {site.name: site.granularity for site in qt.summary(model).sites}
    assert found["0.weight_quantizer"] == found["1.weight_quantizer"] == "channel"
    assert found["3.weight_quantizer"] == "group"


@pytest.mark.parametrize("method", ["gptq", "erq", "bias_correction"])
def test_rounded_weights_lie_on_the_grids_of_groups(method):
    x = torch.randn(64, 24) @ torch.randn(24, 24)
    model = small()
    floats, nearest = model(x), weight_only(copy.deepcopy(model), x)(x)
    rounded = weight_only(model, x, methods=[method])
    scale = rounded[0].weight_quantizer.scale
    assert scale.shape == (16 * 3,)
    codes = rounded[0].weight.detach().reshape(-1, SIZE) / scale[:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert codes.abs().max() <= 8
    assert (rounded(x) - floats).norm() < (nearest - floats).norm()


def test_gptq_with_one_group_is_gptq_per_channel():
    x = torch.randn(64, 24)
    one, channel = (
        weight_only(nn.Sequential(copy.deepcopy(small()[0])), x, weights=w, methods=["gptq"])
        for w in (24, "channel")
    )
    assert torch.equal(one(x), channel(x))


def test_act_order_keeps_each_column_on_the_grid_of_its_group():
    from quanttune.quantization.methods import GPTQ

    x = torch.randn(64, 24) * torch.rand(24)
    rounded = weight_only(nn.Sequential(small()[0]), x, methods=[GPTQ(act_order=True)])
    scale = rounded[0].weight_quantizer.scale
    codes = rounded[0].weight.detach().reshape(-1, SIZE) / scale[:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("methods", [[], ["gptq"]])
def test_saved_and_loaded(methods, tmp_path):
    x = torch.randn(8, 24)
    model = weight_only(small(), x, methods=methods)
    qt.save(model, tmp_path / "model.safetensors")
    loaded = qt.load(small(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert loaded.quantization_state.scheme.weights == SIZE
    assert str(qt.summary(loaded)).splitlines()[1:] != []


def test_a_description_of_other_groups_is_refused(tmp_path):
    from contextlib import ExitStack

    from quanttune.quantization.saving.description import describe, from_description

    description = describe(weight_only(small(), torch.randn(8, 24)))
    next(iter(description["config_groups"].values()))["weights"]["group_size"] = 4
    with ExitStack() as undo, pytest.raises(ValueError, match="has groups of 4, its scheme 8"):
        from_description(small(), description, undo)


def test_scales_are_learned_and_widths_change():
    x = torch.randn(8, 24)
    model = weight_only(small(), x)
    before = model(x).detach()
    assert [tuple(scale.shape) for scale in qt.learn_scales(model)] == [(48,), (10,)]
    torch.testing.assert_close(model(x), before)
    qt.freeze_scales(model)
    again = weight_only(small(), x)
    requantize(again, 4, "channel")
    assert torch.equal(again(x), weight_only(small(), x, weights="channel")(x))
    requantize(again, 4, SIZE)
    assert torch.equal(again(x), before)


def test_other_files_than_compressed_tensors_refuse_groups(tmp_path):
    x = torch.randn(8, 24)
    model = weight_only(small(), x)
    for export in (qt.export_torch, lambda m, x: qt.export_onnx(m, x, tmp_path / "m.onnx")):
        with pytest.raises(ValueError, match=r"0.weight_quantizer has groups of 8 .*compressed"):
            export(model, x)
