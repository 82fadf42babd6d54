"""Clipped softmax and gates of heads, beside attention that is written out in float64."""

import copy
import math
import pickle

import pytest
import torch
from models import MODELS, swin
from torch import nn
from torch.nn import functional as F

import quanttune as qt
from quanttune.tuning.quiet_attention import ClippedSoftmax, HeadGates

each_model = pytest.mark.parametrize("name", ["vit", "bert", "opt"])
ATTENTION = {
    "vit": "blocks.0.attn",
    "bert": "bert.encoder.layer.0.attention.self",
    "opt": "model.decoder.layers.0.self_attn",
}


def example(name):
    found = MODELS[name]()
    found.model.eval()
    for parameter in found.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return found


def test_clipping_by_hand():
    clip = ClippedSoftmax(-0.03, 1.03, None)
    found = clip(torch.tensor([0.01, 0.5, 0.99]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0]))
    by_keys = ClippedSoftmax(0.0, 1.0, 12.0)(torch.full((2, 512), 1 / 512))
    assert by_keys.max() == 0  # (1 + 12 / 512) / 512 is less than 12 / 512


@each_model
def test_nothing_to_clip_changes_nothing(name):
    found = example(name)
    expected = found.logits()
    torch.testing.assert_close(found.logits(qt.clip_softmax(found.model, 0.0, 1.0)), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_a_vit_computes_with_clipped_probabilities(fused):
    attention = example("vit").model.blocks[0].attn.double()
    attention.fused_attn = fused
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    p = (q @ k.transpose(-1, -2) / math.sqrt(12)).softmax(-1)
    clipped = (1.2 * p - 0.1).clamp(0, 1)
    expected = attention.proj((clipped @ v).transpose(1, 2).flatten(2))
    assert (clipped == 0).any()
    qt.clip_softmax(attention, -0.1, 1.1)
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_masked_tokens_stay_masked(name):
    found = example(name)
    model = qt.clip_softmax(found.model, -0.05)
    ids = found.inputs
    padded = F.pad(ids, (0, 3), value=5)
    mask = F.pad(torch.ones_like(ids), (0, 3))
    logits = model(input_ids=padded, attention_mask=mask).logits
    logits = logits[:, : ids.shape[1]] if logits.dim() == 3 else logits
    torch.testing.assert_close(logits, found.logits(model), rtol=1e-4, atol=1e-5)


@each_model
@pytest.mark.parametrize("kind", ["heads", "all"])
def test_gates_change_nothing_at_the_start_and_are_learned(name, kind):
    found = example(name)
    expected = found.logits()
    model = qt.gate_attention(found.model, kind)
    torch.testing.assert_close(found.logits(), expected)
    found.task_loss().backward()
    gates = model.get_submodule(ATTENTION[name]).head_gates
    assert gates.weight.grad.abs().sum() > 0
    assert gates.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["heads", "all"])
def test_gates_are_those_of_heads_and_tokens(kind):
    gates = HeadGates(8, 2, kind, 0.25).double()
    nn.init.normal_(gates.weight)
    hidden = torch.randn(3, 5, 8, dtype=torch.float64)
    found = gates(hidden)
    assert found.shape == (3, 2, 5, 1)
    for head in (0, 1):
        x = hidden[1, 4] if kind == "all" else hidden[1, 4, 4 * head : 4 * head + 4]
        level = (x @ gates.weight[head]).item() - math.log(3)
        assert found[1, head, 4, 0].item() == pytest.approx(4 / (1 + math.exp(-level)))


@each_model
def test_switched_models_are_copied_quantized_saved_and_exported(name, tmp_path):
    found = example(name)

    def switched(model):
        return qt.gate_attention(qt.clip_softmax(model, -0.05))

    untouched = copy.deepcopy(found.model)
    model = switched(found.model)
    assert torch.equal(found.logits(pickle.loads(pickle.dumps(model))), found.logits())
    qt.quantize(model, 8, coverage="full", data=[found.inputs])
    rounded = {site.name.rpartition(".")[2] for site in qt.summary(model).sites}
    assert {"product0_score_quantizer", "product1_left_quantizer"} <= rounded
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(switched(untouched), tmp_path / "model.safetensors").eval()
    assert torch.equal(found.logits(again), found.logits(model))
    if name == "vit":
        from quanttune.deploy.onnx_model import OnnxModel

        qt.export_onnx(model, found.inputs, tmp_path / "model.onnx")
        (logits,) = OnnxModel(tmp_path / "model.onnx")(found.inputs).values()
        torch.testing.assert_close(logits, found.logits(model).detach(), rtol=1e-4, atol=1e-4)


def test_what_switches_do_not_see_is_refused():
    found = example("vit")
    model = qt.gate_attention(found.model)
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(RuntimeError, match="Attention computes attention in a way that switches"):
        found.logits()
    with pytest.raises(ValueError, match="Linear has none of Attention, BertSelfAttention"):
        qt.clip_softmax(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="SwinTransformer has none of"):
        qt.gate_attention(swin().model)


@pytest.mark.parametrize("options", [{"gamma": 0.1}, {"zeta": 0.9}, {"alpha": -1.0}])
def test_arguments_of_clipping_are_checked(options):
    with pytest.raises(ValueError, match="gamma must be at most 0, zeta at least 1"):
        qt.clip_softmax(example("vit").model, **options)


@pytest.mark.parametrize("options", [{"kind": "mlp"}, {"open_share": 1.0}])
def test_arguments_of_gates_are_checked(options):
    with pytest.raises(ValueError, match="kind must be one of heads, all and open_share between"):
        qt.gate_attention(example("vit").model, **options)
