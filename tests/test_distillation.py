"""Q-ViT: similarities of queries and keys by hand, norms of both, and training with all of it."""

import copy
import math

import numpy as np
import pytest
import torch
from models import bert, deit, swin, vit
from oracle import assert_same_bits, quiet
from torch import nn
from torch.nn import functional as F

import quanttune as qt
from quanttune.distillation.distiller import attention_loss, similarities
from quanttune.quantization.running import main_output


def prepared(make=vit, blocks=2):
    """Return an example whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    example = make(blocks)
    for parameter in example.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return example


def queries_and_keys(model, images):
    """Return what each attention's qkv makes, by hand."""
    found = []
    handles = [
        block.attn.qkv.register_forward_hook(lambda *call: found.append(call[2]))
        for block in model.blocks
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    both = []
    for qkv in found:
        q, k, _ = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        both += [q, k]
    return both


# ------------------------------------------------------------------ distillation


def by_hand(ours, theirs):
    """Return the loss in float64, by numpy."""
    distances = []
    for one, other in zip(ours, theirs, strict=True):
        pair = []
        for x in (one, other):
            x = x.detach().double().numpy()
            products = x @ x.swapaxes(-1, -2) / math.sqrt(x.shape[-1])
            pair.append(products / np.linalg.norm(products, axis=(-2, -1), keepdims=True))
        distances.append(np.linalg.norm(pair[0] - pair[1], axis=(-2, -1)).mean())
    return float(np.mean(distances))


def test_similarities_by_hand():
    x = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    expected = torch.tensor([[[[1.0, 0.0], [0.0, 4.0]]]]) / math.sqrt(17)
    torch.testing.assert_close(similarities(x), expected)
    other = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])  # all alike: 1/2 each
    expected = math.sqrt((1 / math.sqrt(17) - 0.5) ** 2 + 0.5 + (4 / math.sqrt(17) - 0.5) ** 2)
    assert attention_loss([x], [other]).item() == pytest.approx(expected)
    assert attention_loss([x, x], [other, x]).item() == pytest.approx(expected / 2)


def test_the_loss_is_that_of_float64_whatever_the_channels():
    torch.manual_seed(0)
    ours = [torch.randn(3, 2, 5, 8) for _ in range(4)]
    theirs = [torch.randn(3, 2, 5, 12) for _ in range(4)]
    assert attention_loss(ours, theirs).item() == pytest.approx(by_hand(ours, theirs), rel=1e-5)


def test_where_they_agree_there_is_no_gradient():
    x = torch.randn(2, 2, 5, 8, requires_grad=True)
    attention_loss([x], [x.detach()]).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    zeros = torch.zeros(1, 1, 3, 4, requires_grad=True)
    attention_loss([zeros], [torch.randn(1, 1, 3, 4)]).backward()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_hears_what_its_attentions_multiply(temperature):
    example = prepared()
    teacher, student = example.model, copy.deepcopy(example.model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    distiller = qt.distill(student, teacher, weight=0.7, temperature=temperature)
    output = student(example.inputs)
    found = distiller.loss(output, example.inputs)
    both = [queries_and_keys(model, example.inputs) for model in (student, teacher)]
    wanted = teacher.eval()(example.inputs)
    logs, targets = ((x.double() / temperature).log_softmax(-1) for x in (output, wanted))
    divergence = (targets.exp() * (targets - logs)).sum(-1).mean() * temperature**2
    expected = divergence.item() + 0.7 * by_hand(*both)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_it_leaves_nothing_behind():
    example = prepared()
    student, teacher = example.model, copy.deepcopy(example.model).train()
    before = copy.deepcopy(teacher.state_dict())
    distiller = qt.distill(student, teacher)
    for _ in range(2):
        distiller.loss(student(example.inputs), example.inputs).backward()
    distiller.detach()
    assert_same_bits(teacher.state_dict(), before)
    assert teacher.training
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="queries and keys have no gradients: call loss after"):
        distiller.loss(student(example.inputs), example.inputs)


def test_a_forward_without_gradients_is_refused():
    example = prepared()
    distiller = qt.distill(example.model, copy.deepcopy(example.model))
    with torch.no_grad():
        output = example.model(example.inputs)
    with pytest.raises(RuntimeError, match="without activation checkpoints"):
        distiller.loss(output, example.inputs)


def trained(model, loss_of, steps=30, parameters=None):
    optimizer = torch.optim.AdamW(parameters or model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [vit, deit])
@pytest.mark.parametrize("how", ["lsq", "pact"])
def test_a_quantized_student_comes_nearer(make, how):
    """With learned ranges, at 3 bits, without labels."""
    example = prepared(make)
    teacher, student = copy.deepcopy(example.model), example.model
    qt.quantize(student.eval(), 3, coverage="linear", data=[example.inputs])
    ranges = qt.learn_scales(student, how)
    assert ranges
    distiller = qt.distill(student, teacher)
    losses = trained(student, lambda: distiller.loss(student(example.inputs), example.inputs))
    assert losses[-1] < 0.8 * losses[0]
    distiller.detach()
    learned = student(example.inputs)
    qt.freeze_scales(student)
    assert torch.equal(main_output(student(example.inputs)), main_output(learned))


@quiet
def test_it_is_a_finishing_stage():
    """Rounded steps of the tuner, with the distiller's loss in place of the task's."""
    example = prepared()
    teacher, student = copy.deepcopy(example.model), example.model
    tuner = qt.attach(student, 0.01, total_steps=12, finish_steps=10, finish_bits=(4,))
    distiller = qt.distill(student, teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = distiller.loss(student(example.inputs), example.inputs)
        losses.append(loss.item())
        optimizer.zero_grad()
        tuner.combine(loss).backward()
        optimizer.step()
        tuner.step()
    tuner.detach()
    distiller.detach()
    assert losses[-1] < losses[2]
    assert student(example.inputs).isfinite().all()


def test_attention_is_what_the_second_term_is_about():
    """Trained with it, similarities are nearer to the teacher's than trained by answers alone."""
    distances = {}
    for weight in (0.0, 5.0):
        example = prepared()
        teacher, student = copy.deepcopy(example.model), example.model
        qt.quantize(student.eval(), 3, coverage="linear", data=[example.inputs])
        qt.learn_scales(student)
        distiller = qt.distill(student, teacher, weight=weight)
        trained(student, lambda: distiller.loss(student(example.inputs), example.inputs))  # noqa: B023
        both = [queries_and_keys(model, example.inputs) for model in (student, teacher)]
        distances[weight] = by_hand(*both)
    assert distances[5.0] < 0.8 * distances[0.0]


# ------------------------------------------------------------------ rectification


def test_norms_begin_where_queries_are_nearest_to_what_they_were():
    """Least squares of each channel, by numpy; the float model computes something near."""
    example = prepared()
    for block in example.model.blocks:
        block.attn.qkv.weight.data.mul_(0.5)
    before = copy.deepcopy(example.model)
    exact = queries_and_keys(before, example.inputs)
    assert qt.rectify_attention(example.model, list(example.inputs.split(3))) is example.model
    for i, block in enumerate(example.model.blocks):
        for norm, y in zip((block.attn.q_norm, block.attn.k_norm), exact[2 * i :], strict=False):
            y = y.double().reshape(-1, y.shape[-1]).numpy()
            z = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-6)
            for channel in range(y.shape[1]):
                slope, start = np.polyfit(z[:, channel], y[:, channel], 1)
                assert norm.weight[channel].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)
                assert norm.bias[channel].item() == pytest.approx(start, rel=1e-3, abs=1e-5)
    found, expected = (model.eval()(example.inputs) for model in (example.model, before))
    plain = copy.deepcopy(before)
    for block in plain.blocks:
        block.attn.q_norm = nn.LayerNorm(12)
        block.attn.k_norm = nn.LayerNorm(12)
    assert (found - expected).norm() < 0.5 * (plain(example.inputs) - expected).norm()


def test_queries_have_mean_0_and_deviation_1_before_factors():
    example = prepared()
    qt.rectify_attention(example.model, [example.inputs])
    attention = example.model.blocks[0].attn
    nn.init.ones_(attention.q_norm.weight)
    nn.init.zeros_(attention.q_norm.bias)
    seen = []
    attention.q_norm.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    example.model(example.inputs)
    assert seen[0].shape == (len(example.inputs), 2, seen[0].shape[2], 12)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(seen[0].shape[:-1]), atol=1e-5, rtol=0)
    deviations = seen[0].std(-1, correction=0)
    torch.testing.assert_close(deviations, torch.ones_like(deviations), atol=1e-3, rtol=0)


def test_all_of_q_vit_together(tmp_path):
    """Rectified, quantized to 3 bits, distilled with learned scales, frozen, saved, exported."""
    example = prepared()
    teacher = copy.deepcopy(example.model)
    student = qt.rectify_attention(example.model, [example.inputs]).eval()
    qt.quantize(student, 3, coverage="linear", data=[example.inputs])
    qt.learn_scales(student)
    distiller = qt.distill(student, teacher)
    losses = trained(student, lambda: distiller.loss(student(example.inputs), example.inputs))
    assert losses[-1] < 0.8 * losses[0]
    distiller.detach()
    qt.freeze_scales(student)
    assert example.model.blocks[0].attn.q_norm.weight.grad.abs().sum() > 0
    qt.save(student, tmp_path / "model.safetensors")
    again = qt.rectify_attention(prepared().model, [example.inputs]).eval()
    qt.load(again, tmp_path / "model.safetensors")
    assert torch.equal(again(example.inputs), student(example.inputs))
    path = tmp_path / "model.onnx"
    qt.export_onnx(student, example.inputs, path)
    found = qt.verify(path, student, [example.inputs])
    assert found.passed, str(found)


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize("make", [bert, swin])
def test_other_models_are_refused_by_name(make):
    model, other = make().model, vit().model
    message = f"{type(model).__name__} has no attention of timm's Vision Transformers"
    with pytest.raises(ValueError, match=message):
        qt.rectify_attention(model, [torch.zeros(1)])
    with pytest.raises(ValueError, match=message):
        qt.distill(model, other)
    with pytest.raises(ValueError, match=message):
        qt.distill(other, model)


def test_what_does_not_fit_is_refused():
    one, two = vit(1), vit(2)
    with pytest.raises(ValueError, match=r"as many attentions and heads, got \[2\] and \[2, 2\]"):
        qt.distill(one.model, two.model)
    with pytest.raises(ValueError, match="student and teacher are one model"):
        qt.distill(one.model, one.model)
    with pytest.raises(ValueError, match="data is empty"):
        qt.rectify_attention(one.model, [])
    assert isinstance(one.model.blocks[0].attn.q_norm, nn.Identity)
    qt.rectify_attention(one.model, [one.inputs])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn normalizes queries and keys already"):
        qt.rectify_attention(one.model, [one.inputs])
    qt.quantize(two.model, data=[two.inputs])
    with pytest.raises(ValueError, match="is quantized already"):
        qt.rectify_attention(two.model, [two.inputs])
    assert F.softmax(two.model(two.inputs), -1).isfinite().all()
