"""PEG: groups of channels with scales of their own, by hand and in models."""

import copy

import pytest
import torch
from models import MODELS, bert, shallow
from torch import nn

import quanttune as qt
from quanttune.quantization.methods import PEG
from quanttune.quantization.state import quantizers


def test_groups_by_hand():
    ranges = torch.tensor([1.0, 9, 2, 8, 3, 7])
    assert PEG(groups=3).covered(ranges).tolist() == [2, 9, 2, 9, 7, 7]
    assert PEG(groups=3, permute=False).covered(ranges).tolist() == [9, 9, 8, 8, 7, 7]
    assert PEG(groups=1).covered(ranges).tolist() == [9] * 6
    assert PEG(groups=6).covered(ranges).tolist() == ranges.tolist()
    assert PEG(groups=7).covered(ranges).tolist() == ranges.tolist()
    assert PEG(groups=4).covered(ranges).tolist() == [2, 9, 2, 8, 7, 7]  # of 2, 2, 1 and 1


def test_channels_are_rounded_in_the_steps_of_their_group():
    x = torch.randn(50, 12) * torch.logspace(0, 2, 12)[torch.randperm(12)]
    layer = nn.Linear(12, 5)
    options = {"bits": 6, "coverage": "linear_inputs", "data": x.split(20)}
    model = qt.quantize(nn.Sequential(copy.deepcopy(layer)), methods=[PEG(groups=4)], **options)
    largest = x.double().abs().amax(0)
    expected = torch.empty(50, 12, dtype=torch.float64)
    for group in largest.argsort().split(3):
        step = (largest[group].max() / 31).float().double()
        expected[:, group] = (x.double()[:, group] / step).round() * step
    torch.testing.assert_close(model[0].input_quantizer(x).double(), expected)
    plain = qt.quantize(nn.Sequential(copy.deepcopy(layer)), **options)
    steps = model[0].input_quantizer.steps
    assert len(steps.unique()) == 4
    assert steps.max() == plain[0].input_quantizer.scale
    exact = layer(x)
    assert (model(x) - exact).norm() < (plain(x) - exact).norm()


def test_one_group_is_the_tensor_and_calibrators_still_clip():
    example = MODELS["vit"]()
    example.model.eval()
    options = {"bits": 6, "calibrator": "percentile", "data": [example.inputs]}
    plain = qt.quantize(copy.deepcopy(example.model), **options)
    one = qt.quantize(copy.deepcopy(example.model), methods=[PEG(groups=1)], **options)
    assert torch.equal(example.logits(one), example.logits(plain))


@pytest.mark.parametrize("name", MODELS)
def test_models_are_saved_loaded_and_told(name, tmp_path):
    example = shallow(name)
    with torch.no_grad():
        for module in example.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.logspace(-1, 1, len(module.weight)).flip(0))
    exact, fresh = example.logits(), copy.deepcopy(example.model)
    plain = qt.quantize(copy.deepcopy(fresh), 4, data=[example.inputs])
    model = qt.quantize(example.model, 4, methods=["peg"], data=[example.inputs])
    groups = {n: q for n, q in quantizers(model).items() if q.grid == "channel_groups"}
    assert {q.kind for q in groups.values()} >= {"input", "residual", "norm"}
    assert not any("patch_embed.proj" in site for site in groups)  # its last dimension is none
    off = [(example.logits(m) - exact).norm() for m in (model, plain)]
    assert off[0] < off[1]
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(example.logits(again), example.logits())
    assert " channel_groups" in str(qt.summary(again))
    with pytest.raises(ValueError, match=r"peg rounds .* to a channel_groups grid"):
        qt.export_onnx(model, example.inputs, tmp_path / "model.onnx")


def test_padding_takes_no_part():
    example = bert()
    mask = torch.ones_like(example.inputs)
    mask[:, 5:] = 0
    batch = {"input_ids": example.inputs, "attention_mask": mask}
    with torch.no_grad():
        example.model.bert.embeddings.word_embeddings.weight[1] = 100  # of padding
    example.inputs[:, 5:] = 1
    fresh = copy.deepcopy(example.model.eval())
    model = qt.quantize(example.model, methods=["peg"], data=[batch])
    alone = qt.quantize(fresh, methods=["peg"], data=[{"input_ids": example.inputs[:, :5]}])
    found, wanted = (m.bert.embeddings.LayerNorm.input_quantizer for m in (model, alone))
    assert torch.equal(found.steps, wanted.steps)
    assert len(found.steps.unique()) > 3


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("peg", {"calibrator": "dynamic"}, "peg needs constant symmetric grids"),
        ("peg", {"symmetric": False}, "peg needs constant symmetric grids"),
        ("peg", {"coverage": "weight_only"}, "peg is for activations of residual, norm"),
        (PEG(kinds=("residual",)), {"coverage": "linear"}, "peg is for activations of residual"),
    ],
)
def test_where_it_does_not_apply(method, options, message):
    example = MODELS["vit"]()
    with pytest.raises(ValueError, match=message):
        qt.quantize(example.model, methods=[method], data=[example.inputs], **options)


def test_options_are_checked():
    with pytest.raises(ValueError, match="groups must be a whole number from 1, got 0"):
        PEG(groups=0)
    with pytest.raises(ValueError, match=r"kinds must be of residual, .*, got 'score'"):
        PEG(kinds=("score",))
