"""Training of quantized models: learned scales against float64, and real models that learn."""

import copy
import math

import pytest
import torch
from models import MODELS
from oracle import quiet
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import quanttune as qt
from quanttune.fake_quantizer import grid_of
from quanttune.quantization.learning.lsq import LearnedFakeQuant
from quanttune.quantization.requantization import requantize
from quanttune.quantization.simulation import quantizers
from quanttune.quantization.state import weight_quantizers


def oracle(x, scale, bits, axis=None):
    """LSQ in float64 by autograd: rounding is straight-through, gradients of scales are scaled."""
    qmax = 2 ** (bits - 1) - 1
    x, scale = x.double(), scale.double()
    factor = 1 / math.sqrt(x.numel() / scale.numel() * qmax)
    scale = scale * factor + (scale - scale * factor).detach()
    if axis is not None:
        scale = scale.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    steps = x / scale
    codes = (steps.round() - steps).detach() + steps
    inside = (codes >= -qmax - 1) & (codes <= qmax)
    return torch.where(inside, codes, codes.detach().clamp(-qmax - 1, qmax)) * scale


def learned_fake_quant(x, scale, bits, axis=None):
    return LearnedFakeQuant.apply(x, scale, *grid_of(x, scale, bits, axis))


def test_slopes_of_a_hand_worked_case():
    """3 bits, scale 1: 0.7 is rounded up, 5 and -9 are clipped to 3 and -4."""
    x = torch.tensor([0.7, 5.0, -9.0])
    for i, (dx, ds) in enumerate([(1, 0.3), (0, 3), (0, -4)]):
        leaf, scale = x.clone().requires_grad_(), torch.ones((), requires_grad=True)
        learned_fake_quant(leaf, scale, 3)[i].backward()
        assert leaf.grad[i] == dx
        assert scale.grad.item() * math.sqrt(3 * 3) == pytest.approx(ds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_float64(bits, axis, dtype):
    x = torch.randn(6, 7, 5).to(dtype).requires_grad_()
    shape = () if axis is None else (x.shape[axis],)
    scale = (torch.rand(shape) + 0.5).div(2 ** (bits - 2)).requires_grad_()  # some are clipped
    upstream = torch.randn(6, 7, 5).to(dtype)
    reference = [tensor.detach().double().requires_grad_() for tensor in (x, scale)]
    expected = oracle(*reference, bits, axis)
    expected.backward(upstream.double())
    y = learned_fake_quant(x, scale, bits, axis)
    y.backward(upstream)
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=0)
    assert torch.equal(x.grad.double(), reference[0].grad)  # the incoming gradient, or 0
    assert 0 < (x.grad == 0).float().mean() < 1
    error = (scale.grad - reference[1].grad).norm() / reference[1].grad.norm()
    assert error < 1e-5
    assert scale.grad.dtype == torch.float32


def test_a_scale_that_was_stepped_below_zero_is_used_as_the_smallest():
    x, scale = torch.tensor([1.0, -1.0]), torch.tensor(-0.5)
    smallest = torch.finfo(torch.float32).eps
    assert torch.equal(learned_fake_quant(x, scale, 3), torch.tensor([3.0, -4.0]) * smallest)
    assert learned_fake_quant(torch.ones(0), torch.ones(()), 3).shape == (0,)


def learning(name="vit", **options):
    """Return an example whose model learns its scales, a copy before that, and the scales."""
    example = MODELS[name]()
    qt.quantize(example.model.eval(), data=[example.inputs], **options)
    before = copy.deepcopy(example.model)
    return example, before, qt.learn_scales(example.model)


@pytest.mark.parametrize("name", MODELS)
def test_learning_starts_where_the_quantized_model_is(name):
    example, before, scales = learning(name, weight_bits=4, weights="tensor")
    assert torch.equal(example.logits(), example.logits(before))
    parameters = {id(parameter) for parameter in example.model.parameters()}
    assert all(id(scale) in parameters for scale in scales)
    # every activation, functional sites included, and all weights but tables
    weights = [owner for owner, _ in weight_quantizers(before).values()]
    tables = sum(isinstance(owner, nn.Embedding) for owner in weights)
    assert len(scales) == len(quantizers(before)) + len(weights) - tables
    qt.freeze_scales(example.model)
    assert torch.equal(example.logits(), example.logits(before))


def test_a_linear_layer_learns_as_float64_does():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(7, 6)
    qt.quantize(model, 3, data=[x])
    qt.learn_scales(model)
    layer = model[0]
    parts = [layer.input_quantizer, layer.weight_quantizer, layer.output_quantizer]
    leaves = [layer.weight, layer.bias, *(part.factor for part in parts)]
    reference = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weight, bias, *factors = reference
    pairs = zip(parts, factors, strict=True)
    input_scale, weight_scale, output_scale = (part.scale * factor for part, factor in pairs)
    hidden = F.linear(oracle(x, input_scale, 3), oracle(weight, weight_scale, 3, 0), bias)
    oracle(hidden, output_scale, 3).square().sum().backward()
    model(x).square().sum().backward()
    for leaf, expected in zip(leaves, reference, strict=True):
        error = (leaf.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-5


def steps(example, model, parameters, count, combine=lambda loss: loss):
    """Take steps, and return the losses before each."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = combine(example.task_loss(model))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@quiet
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_tune_then_train_then_save(name, tmp_path):
    """A tuned model is quantized, its scales learn, and what is saved is what was learned."""
    example = MODELS[name]()
    with_outlier_loss = qt.attach(example.model, 0.1, "constant", balance="initial")
    steps(example, example.model, example.model.parameters(), 20, with_outlier_loss.combine)
    with_outlier_loss.detach()
    model = qt.quantize(example.model, 4, data=[example.inputs])
    scales = qt.learn_scales(model)
    start = [scale.detach().clone() for scale in scales]
    groups = [
        {"params": [p for p in model.parameters() if not any(p is s for s in scales)]},
        {"params": scales, "weight_decay": 0.0},
    ]
    losses = steps(example, model.train(), groups, 15)
    assert losses[-1] < 0.85 * losses[0]
    assert all(not torch.equal(scale, old) for scale, old in zip(scales, start, strict=True))
    expected = example.logits(model.eval())
    qt.freeze_scales(model)
    assert torch.equal(example.logits(model), expected)
    assert not any("quantizer" in name for name, _ in model.named_parameters())
    qt.save(model, tmp_path / "model.safetensors")
    loaded = qt.load(MODELS[name]().model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(loaded), expected)


def test_straight_through_trains_with_the_ranges_of_the_calibration():
    example = MODELS["vit"]()
    steps(example, example.model, example.model.parameters(), 20)
    model = qt.quantize(example.model, 4, data=[example.inputs])
    ranges = {name: quantizer.scale.clone() for name, quantizer in quantizers(model).items()}
    losses = steps(example, model, model.parameters(), 15)
    assert losses[-1] < 0.85 * losses[0]
    assert all(torch.equal(q.scale, ranges[name]) for name, q in quantizers(model).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    example, before, _ = learning("bert", coverage="full")
    qt.learn_scales(before)
    options = {"use_reentrant": reentrant}
    before.activation_checkpointing_enable(options)
    for model in (example.model, before):
        example.task_loss(model.train()).backward()
    expected = {name: p.grad for name, p in example.model.named_parameters()}
    found = {name: p.grad for name, p in before.named_parameters()}
    assert sum(grad is not None for grad in found.values()) > 50
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        assert grad is None or torch.equal(found[name], grad), name


def test_a_model_that_is_learning_can_be_saved_and_copied(tmp_path):
    example, _, _ = learning()
    steps(example, example.model, example.model.parameters(), 1)
    qt.save(example.model, tmp_path / "model.safetensors")
    loaded = qt.load(MODELS["vit"]().model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(loaded), example.logits())
    assert torch.equal(example.logits(copy.deepcopy(example.model)), example.logits())


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_a_checkpoint_of_the_trainer_goes_on_learning(tmp_path):
    example, _, scales = learning("bert")
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-3
    )
    pairs = zip(example.inputs, example.labels, strict=True)
    rows = [{"input_ids": words, "labels": label} for words, label in pairs]
    Trainer(example.model, arguments, train_dataset=rows).train()
    moved = [not torch.equal(scale, torch.ones_like(scale)) for scale in scales]
    assert sum(moved) > len(moved) / 2  # what is rounded twice on one grid has no slope
    loaded = type(example.model).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(example.logits(loaded), example.logits(example.model.eval()))
    factors = [name for name, _ in loaded.named_parameters() if name.endswith(".factor")]
    assert len(factors) == len(scales)
    qt.freeze_scales(loaded)
    loaded.save_pretrained(tmp_path / "frozen")
    frozen = type(loaded).from_pretrained(tmp_path / "frozen")
    assert torch.equal(example.logits(frozen), example.logits(loaded))
    assert not any(name.endswith(".factor") for name, _ in frozen.named_parameters())


def test_another_width_covers_the_learned_range():
    example, _, _ = learning()
    steps(example, example.model, example.model.parameters(), 1)
    with pytest.raises(ValueError, match=r"call freeze_scales\(model\) first"):
        requantize(example.model, 6, "channel")
    qt.freeze_scales(example.model)
    absmax = {name: q.scale * 127 for name, q in quantizers(example.model).items()}
    requantize(example.model, 6, "channel")
    for name, quantizer in quantizers(example.model).items():
        torch.testing.assert_close(quantizer.scale, absmax[name] / 31, rtol=1e-6, atol=0)


def test_models_without_scales_are_refused():
    with pytest.raises(ValueError, match="Linear is not quantized"):
        qt.learn_scales(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear is not quantized"):
        qt.freeze_scales(nn.Linear(2, 2))
    dynamic = qt.quantize(nn.Sequential(nn.Linear(2, 2)), calibrator="dynamic")
    with pytest.raises(ValueError, match="a dynamic model has no scales to learn"):
        qt.learn_scales(dynamic)
