"""requantize: other schemes without data, beside models that are quantized anew."""

import copy

import onnx
import pytest
import torch
from models import MODELS
from onnx import numpy_helper
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import quanttune as qt
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.quantization.powers_of_two import nearest_power_of_two, power_of_two_above
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers, weight_quantizers


def prepared(name: str):
    torch.manual_seed(3)
    example = MODELS[name]()
    example.model.eval()
    return example


def quantized(example, **options):
    return qt.quantize(copy.deepcopy(example.model), data=[example.inputs], **options)


def is_shift(scale) -> bool:
    exponent = scale.double().log2()
    return bool((exponent == exponent.round()).all())


# ------------------------------------------------------------------ what is as quantized anew


@pytest.mark.parametrize("name", MODELS)
def test_without_zero_points_a_model_is_the_symmetric_one(name):
    example = prepared(name)
    model = quantized(example, symmetric=False, coverage="full")
    assert qt.requantize(model, symmetric=True) is model
    fresh = quantized(example, coverage="full")
    assert torch.equal(example.logits(model), example.logits(fresh))
    assert describe(model) == describe(fresh)
    qt.requantize(model, 5, "tensor", weight_bits=4)
    fresh = quantized(example, bits=5, weights="tensor", weight_bits=4, coverage="full")
    assert torch.equal(example.logits(model), example.logits(fresh))
    assert describe(model) == describe(fresh)


def test_codes_that_a_method_chose_stay_where_the_grid_only_gets_wider():
    example = prepared("vit")
    model = quantized(example, weight_bits=4, coverage="linear", methods=["gptq"])
    before = copy.deepcopy(model)
    qt.requantize(model, 8, weight_bits=6)
    assert {q.bits for _, q in weight_quantizers(model).values()} == {6}
    kept = [n for n, (_, q) in weight_quantizers(before).items() if q.scale is not None]
    for name in kept:
        holder, one = weight_quantizers(model)[name]
        assert torch.equal(one(holder.weight), holder.weight)
        assert torch.equal(one.scale, weight_quantizers(before)[name][1].scale)


def test_narrower_weights_are_those_of_the_same_codes_quantized_anew():
    example = prepared("vit")
    model = quantized(example, coverage="linear", methods=["gptq"])
    fresh = copy.deepcopy(example.model)
    plain = {k: v for k, v in model.state_dict().items() if "quantizer" not in k}
    fresh.load_state_dict(plain)  # the codes, times their scales
    qt.requantize(model, weight_bits=3)
    qt.quantize(fresh, weight_bits=3, coverage="linear", data=[example.inputs])
    for name, (holder, one) in weight_quantizers(model).items():
        other, grid = weight_quantizers(fresh)[name]
        assert torch.equal(one(holder.weight), grid(other.weight))


def test_experts_and_what_no_module_holds_get_the_width():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    torch.manual_seed(0)
    exact = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    ids = torch.randint(2, 60, (2, 7))
    model, fresh = (
        qt.quantize(copy.deepcopy(exact), bits, weights=weights, data=[ids])
        for bits, weights in ((8, "channel"), (5, "tensor"))
    )
    qt.requantize(model, 5, "tensor")
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert describe(model) == describe(fresh)
    with pytest.raises(ValueError, match="rounds a parameter that no Linear holds"):
        qt.requantize(model, power_of_two=True)


# ------------------------------------------------------------------ powers of two


def test_powers_of_two_by_hand():
    scale = torch.tensor([1.0, 1.1, 0.5, 0.74, 3e-7, 0.25 * (1 + 3e-7)])
    above = torch.tensor([1.0, 2.0, 0.5, 1.0, 2.0**-21, 0.25])
    assert torch.equal(power_of_two_above(scale), above)
    assert torch.equal(nearest_power_of_two(torch.tensor([1.4, 1.5])), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_all_scales_become_powers_of_two_and_nothing_is_clipped(name, symmetric, tmp_path):
    example = prepared(name)
    model = quantized(example, symmetric=symmetric)
    before = {name: q.scale.clone() for name, q in quantizers(model).items()}
    assert "powers of two" not in str(qt.summary(model))
    qt.requantize(model, power_of_two=True)
    for site, one in quantizers(model).items():
        assert is_shift(one.scale)
        assert before[site] <= one.scale < 2 * before[site] * (1 + 1e-6)
    for _, one in weight_quantizers(model).values():
        assert is_shift(one.scale)
    assert "all scales are powers of two" in str(qt.summary(model))
    fine = copy.deepcopy(model)
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(prepared(name).model, tmp_path / "model.safetensors")
    assert torch.equal(example.logits(again), example.logits(model))
    assert qt.summary(again).power_of_two
    qt.requantize(fine, power_of_two=True)  # once more changes nothing
    assert torch.equal(example.logits(fine), example.logits(model))


def test_rows_of_a_table_are_rounded_in_their_own_steps():
    example = prepared("opt")
    model = qt.requantize(quantized(example), power_of_two=True)
    table = model.model.decoder.embed_tokens
    rounded = table.weight_quantizer(table.weight)
    assert torch.equal(table(example.inputs), rounded[example.inputs])
    codes = rounded / table.weight_quantizer.scale[:, None]
    assert torch.equal(codes, codes.round())


def test_codes_of_a_method_follow_what_norms_return():
    example = prepared("vit")
    norm, first = example.model.blocks[0].norm1, quantized(example, coverage="linear")
    scale = first.blocks[0].attn.qkv.input_quantizer.scale
    norm.weight.data *= 1.3 * nearest_power_of_two(scale) / scale
    model = quantized(example, coverage="linear", methods=["gptq"])
    layer = model.blocks[0].attn.qkv
    scale = layer.weight_quantizer.scale.clone()
    factor = layer.input_quantizer.scale / nearest_power_of_two(layer.input_quantizer.scale)
    qt.requantize(model, power_of_two=True, example=example.inputs)
    assert factor.item() == pytest.approx(1.3, rel=1e-3)
    wide = power_of_two_above(scale * factor)
    rows = layer.weight.detach().double()
    loss = [
        ((rows / s[:, None]).round().clamp(-128, 127) * s[:, None] - rows).square().sum(1)
        for s in (wide.double(), wide.double() / 2)
    ]
    best = torch.where(loss[1] < loss[0], wide / 2, wide)
    assert torch.equal(layer.weight_quantizer.scale, best)
    assert (power_of_two_above(scale) != wide).any()


def test_a_weight_takes_the_scale_that_loses_less():
    layer = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = torch.linspace(-1, 1, 64), 0.02
        layer.weight[1, 0] = 65 / 128  # above 64 / 128: clipped by half a step, or coarse for all
    rows = layer.weight.detach().double()
    model = qt.quantize(nn.Sequential(layer), coverage="weight_only", data=[torch.randn(2, 64)])
    qt.requantize(model, power_of_two=True)
    scale = model[0].weight_quantizer.scale
    for row, found in zip(rows, scale, strict=True):
        losses = {
            k: ((row / 2.0**k).round().clamp(-128, 127) * 2.0**k - row).square().sum().item()
            for k in range(-12, 0)
        }
        assert min(losses, key=losses.get) == found.log2().item()


@pytest.mark.parametrize("name", ["vit", "opt"])
def test_what_norms_return_keeps_its_codes_where_readers_give_it_back(name):
    example = prepared(name)
    with torch.no_grad():
        for module in example.model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
    patches = {"patch_embed.proj": None} if name == "vit" else None  # what norms are given stays
    model = quantized(example, coverage="linear_inputs", overrides=patches)
    plain = copy.deepcopy(model)

    def see(into):
        def hook(module, args):
            into[module.kind, len(into)] = (args[0] / module.scale).round()

        return hook

    def run(one):
        found = {}
        hooks = [q.register_forward_pre_hook(see(found)) for q in quantizers(one).values()]
        logits = example.logits(one)
        for hook in hooks:
            hook.remove()
        return found, logits

    codes, exact = run(model)
    random = torch.randint(2, 60, (2, 7)) if name == "opt" else torch.randn(2, 3, 16, 16)
    qt.requantize(model, power_of_two=True, example=random)
    qt.requantize(plain, power_of_two=True)
    assert all(is_shift(q.scale) for q in quantizers(model).values())
    folded, near = run(model)
    first = next(iter(codes))  # what a norm returned, of the same input
    assert (folded[first] != codes[first]).float().mean() < 1e-3
    _, far = run(plain)
    assert (near - exact).norm() < (far - exact).norm()


def test_the_scales_of_an_exported_file_are_powers_of_two(tmp_path):
    example = prepared("vit")
    model = quantized(example, coverage="linear")
    qt.requantize(model, power_of_two=True, example=example.inputs)
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, example.inputs, path)
    graph = onnx.load(path).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = [stored[node.input[1]] for node in nodes]
    assert len(scales) > 10
    assert all(is_shift(torch.from_numpy(scale.copy())) for scale in scales)
    (found,) = OnnxModel(path)(example.inputs).values()
    torch.testing.assert_close(found, example.logits(model).detach(), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ sums of rows


@pytest.mark.parametrize(
    ("before", "changes"), [(3, {"power_of_two": True}), (8, {"weight_bits": 3})]
)
@pytest.mark.parametrize("weights", ["channel", 8])
def test_corrected_weights_keep_the_sums_of_rows(weights, before, changes):
    torch.manual_seed(0)
    layer = nn.Linear(64, 16)
    layer.weight.data += 0.03
    rows, x = layer.weight.detach().double(), torch.randn(50, 64)
    options = {"coverage": "weight_only", "weights": weights, "weight_bits": before}
    model = qt.quantize(nn.Sequential(layer), data=[x], **options)
    plain = qt.requantize(copy.deepcopy(model), **changes)
    qt.requantize(model, **changes, correct_weights=True)
    size = 64 if weights == "channel" else weights
    step = model[0].weight_quantizer.scale.double().view(16, -1, 1).expand(16, 64 // size, 1)
    off = [
        ((m[0].weight_quantizer(m[0].weight).double() - rows).unflatten(1, (-1, size)) / step)
        for m in (model, plain)
    ]
    held = off[0][off[1].abs().amax(-1) <= 0.5]  # clipped rows have errors of any size
    assert len(held) > 4
    assert held.sum(-1).abs().max() <= 0.5 + 1e-5
    assert held.abs().max() < 1
    assert off[1].sum(-1).abs().max() > 0.5
    ones = torch.ones(1, 64)  # an input of equal channels
    wanted = ones.double() @ rows.T + layer.bias.double()
    assert (model(ones) - wanted).norm() < (plain(ones) - wanted).norm()


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"symmetric": False}, r"has no zero point, and its range does not tell both ends"),
        ({"calibrator": "dynamic"}, {"power_of_two": True}, "takes its range from each tensor"),
        ({"calibrator": "mse"}, {"bits": 6}, "mse searched its ranges for 8 bits"),
        ({}, {"bits": 1}, "bits must be from 2 to 16"),
        ({}, {"weights": 7}, "inputs do not make groups of 7"),
    ],
)
def test_what_takes_data_is_refused_and_changes_nothing(options, changes, message):
    example = prepared("vit")
    model = quantized(example, **options)
    before = example.logits(model)
    with pytest.raises(ValueError, match=message):
        qt.requantize(model, **changes)
    assert torch.equal(example.logits(model), before)


def test_learned_scales_and_float_models_are_refused():
    example = prepared("vit")
    with pytest.raises(ValueError, match="is not quantized"):
        qt.requantize(example.model, 8)
    model = quantized(example)
    qt.learn_scales(model)
    with pytest.raises(ValueError, match=r"is being learned: call freeze_scales\(model\) first"):
        qt.requantize(model, power_of_two=True)
