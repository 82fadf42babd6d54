"""Weights that stay in float among codes: GWQ's, and PreQuant's, which alone are trained."""

import copy
import re
import warnings
from contextlib import ExitStack

import pytest
import torch
from models import MODELS, gpt2
from oracle import assert_same_bits
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import quanttune as qt
from quanttune.quantization.methods import GWQ, PreQuant
from quanttune.quantization.outliers import Outliers, largest_of, outliers_in
from quanttune.quantization.requantization import requantize
from quanttune.quantization.saving.description import check_loaded, describe, from_description
from quanttune.trainer import QuantTuneTrainer

WEIGHTS = {"coverage": "weight_only", "weight_bits": 3, "weights": 8}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).eval()


def quantized(*methods, **options):
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    return qt.quantize(small(), data=x.split(30), methods=methods, **{**WEIGHTS, **options}), x


def gradients_by_hand(model, data):
    """Return squared gradients of each Linear, by backward(), for the signs that GWQ draws."""
    signs = torch.Generator().manual_seed(0)
    found = {}
    for x in data:
        y = model(x)
        model.zero_grad()
        (y * (2 * torch.randint(2, y.shape, generator=signs) - 1)).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                found[name] = found.get(name, 0) + parameter.grad.double().square()
    return found


# ------------------------------------------------------------------ gwq


@pytest.mark.parametrize("weights", [8, "channel", "tensor"])
def test_the_weights_of_the_largest_gradients_stay_in_sixteen_bits(weights):
    model, x = quantized(GWQ(share=0.1), weights=weights)
    exact = small()
    gradients = gradients_by_hand(exact, x.split(30))
    for name in ("0", "2"):
        layer, weight = model.get_submodule(name), exact.get_submodule(name).weight.detach()
        count = round(0.1 * weight.numel())
        chosen = gradients[f"{name}.weight"].flatten().argsort(descending=True)[:count]
        positions = layer.weight_quantizer.outliers.positions
        assert sorted(chosen.tolist()) == positions.tolist()
        found = layer.weight_quantizer(layer.weight).flatten()
        assert torch.equal(found[positions], weight.flatten()[positions].half().float())
        rest = torch.ones(weight.numel(), dtype=torch.bool)
        rest[positions] = False
        rows = {8: weight.view(-1, 8), "channel": weight, "tensor": weight.view(1, -1)}[weights]
        others = torch.where(rest.view_as(rows), rows.double(), 0.0)
        step = (others.abs().amax(1, keepdim=True) / 3).float().double()
        step = torch.where(step == 0, 1.0, step)
        expected = ((others / step).round() * step).flatten()
        torch.testing.assert_close(found[rest].double(), expected[rest], rtol=1e-6, atol=1e-7)


def test_outliers_are_the_float_product():
    model, x = quantized(GWQ(share=0.05))
    layer, exact = model[0], small()[0]
    with torch.no_grad():
        mask = torch.zeros(24 * 16)
        mask[layer.weight_quantizer.outliers.positions] = 1
        kept = exact.weight * mask.view(24, 16)
        others = layer.weight_quantizer.round(layer.weight) * (1 - mask.view(24, 16))
        wanted = x @ kept.half().float().T + x @ others.T + exact.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_it_is_nearer_than_plain_rounding_and_than_keeping_others():
    exact = small()
    model, x = quantized(GWQ(share=0.05))
    plain, _ = quantized()
    off = [(m(x) - exact(x)).norm().item() for m in (model, plain)]
    assert off[0] < off[1]


def test_values_beyond_sixteen_bits_stay_as_they_are():
    model = small()
    model[0].weight.data[0, 0] = 1e6
    x = torch.randn(30, 16)
    qt.quantize(model, data=[x], methods=[GWQ(share=0.9)], **WEIGHTS)
    assert model[0].weight_quantizer(model[0].weight).max() == 1e6


@pytest.mark.parametrize("method", ["gwq", "prequant"])
@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_models_are_saved_loaded_moved_and_told(name, method, tmp_path):
    example = {**MODELS, "gpt2": gpt2}[name]()
    fresh = copy.deepcopy(example.model.eval())
    model = qt.quantize(example.model, weight_bits=4, methods=[method], data=[example.inputs])
    count = sum(len(one.positions) for one in outliers_in(model).values())
    assert count > 10
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(copy.deepcopy(fresh), tmp_path / "model.safetensors").eval()
    assert torch.equal(example.logits(again), example.logits(model))
    assert_same_bits(again.state_dict(), model.state_dict())
    assert describe(again) == describe(model)
    assert torch.equal(example.logits(copy.deepcopy(model)), example.logits(model))
    assert qt.summary(model).integer_parameters < 1
    low = copy.deepcopy(again).bfloat16()
    assert all(one.values.dtype == torch.float32 for one in outliers_in(low).values())
    if name != "swin" and name != "vit":
        assert example.logits(low).isfinite().all()
    with pytest.raises(ValueError, match=r"keeps weights in float among its codes \(gwq, prequant"):
        qt.export_onnx(model, example.inputs, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="keeps weights in float among its codes: quantize the"):
        requantize(model, 8)


# ------------------------------------------------------------------ prequant


def test_marked_weights_are_the_largest_and_the_model_is_the_plain_one():
    model, x = quantized(PreQuant(share=0.03))
    plain, _ = quantized()
    assert torch.equal(model(x), plain(x))
    for name in ("0", "2"):
        weight = small().get_submodule(name).weight
        positions = model.get_submodule(name).weight_quantizer.outliers.positions
        lowest = weight.abs().flatten()[positions].min()
        assert len(positions) == round(0.03 * weight.numel())
        assert (weight.abs() > lowest).sum() < len(positions)
    assert largest_of(torch.tensor([[3.0, 1], [2, 9]]), 0.5).tolist() == [0, 3]
    assert largest_of(torch.tensor([1.0, 2]), 0.01).tolist() == [1]


def trained(model, x, y, parameters, steps=30):
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_training_moves_outliers_alone():
    model, x = quantized(PreQuant(share=0.1))
    y = torch.randn(60, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = (model(x) - y).square().mean().item()
    parameters = qt.learn_outliers(model)
    assert [tuple(p.shape) for p in parameters] == [(38,), (19,)]
    assert trained(model, x, y, model.parameters()) < 0.97 * first
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".outliers.values"), name
    layer = model[0]
    weight = layer.weight_quantizer(layer.weight)
    codes = torch.ones(weight.numel(), dtype=torch.bool)
    codes[layer.weight_quantizer.outliers.positions] = False
    assert torch.equal(weight.flatten()[codes], layer.weight.flatten()[codes])


def test_heads_may_be_trained_besides():
    model, _ = quantized("prequant")
    parameters = qt.learn_outliers(model, also=["2.*"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "0.weight_quantizer.outliers.values", "2.weight_quantizer.outliers.values", "2.weight",
    }  # fmt: skip
    assert len(parameters) == 3
    with pytest.raises(ValueError, match="also has 'head', which matches no parameter"):
        qt.learn_outliers(model, also=["head"])
    with pytest.raises(ValueError, match=r"keeps no outliers: quantize it with methods=\[\"pre"):
        qt.learn_outliers(quantized()[0])


@pytest.mark.parametrize("kind", [Trainer, QuantTuneTrainer])
def test_trainers_move_outliers_alone_and_the_model_is_saved(kind, tmp_path):
    import quanttune.quantization.pretrained  # noqa: F401

    example = MODELS["bert"]()
    qt.quantize(example.model.eval(), weight_bits=4, methods=["prequant"], data=[example.inputs])
    qt.learn_outliers(example.model)
    before = {name: value.clone() for name, value in example.model.state_dict().items()}
    rows = [
        {"input_ids": row, "labels": label}
        for row, label in zip(example.inputs, example.labels, strict=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    options = {"tuning": {"alpha": 0.1}} if kind is QuantTuneTrainer else {}
    kind(example.model, arguments, train_dataset=rows, **options).train()
    moved = [n for n, v in example.model.state_dict().items() if not torch.equal(v, before[n])]
    assert moved
    assert all(name.endswith(".outliers.values") for name in moved)
    example.model.eval().save_pretrained(tmp_path / "model")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(example.logits(again), example.logits())


def marked_vit():
    example = MODELS["vit"]()
    qt.quantize(example.model.eval(), weight_bits=4, methods=["prequant"], data=[example.inputs])
    qt.learn_outliers(example.model.train())
    return example, {name: value.clone() for name, value in example.model.state_dict().items()}


def moved(model, before):
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def test_lightning_moves_outliers_alone(tmp_path):
    from test_lightning_callback import Classifier, loader, make_trainer

    from quanttune.trainer import QuantTuneCallback

    example, before = marked_vit()
    data = loader([(example.inputs[i : i + 2], example.labels[i : i + 2]) for i in (0, 2)] * 2)
    callback = QuantTuneCallback({"alpha": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning says of loaders, and asks of torch
        make_trainer(tmp_path, callback).fit(Classifier(example.model), data)
    found = moved(example.model, before)
    assert found
    assert all(name.endswith(".outliers.values") for name in found)


def test_tasks_of_timm_move_outliers_alone():
    from test_timm_task import begin, train

    example, before = marked_vit()
    task, _ = begin(example.model, alpha=0.1)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3)
    train(task, optimizer, [(example.inputs, example.labels)] * 2)
    found = moved(example.model, before)
    assert found
    assert all(name.endswith(".outliers.values") for name in found)


# ------------------------------------------------------------------ files of others


def test_other_descriptions_and_files_are_refused():
    model, _ = quantized("gwq")
    good = describe(model)
    for bad, message in (
        ({"0.weight_quantizer": 0}, "outliers.0.weight_quantizer must be a number from 1, got 0"),
        ({"1.weight_quantizer": 2}, "outliers: '1.weight_quantizer' rounds no weight of a Linear"),
        ({"0.weight_quantizer": 10**12}, "has 384 weights, got 1000000000000"),
        ([2], "outliers must be an object"),
    ):
        with ExitStack() as undo, pytest.raises(ValueError, match=re.escape(message)):
            from_description(small(), good | {"outliers": bad}, undo)
    for positions, values, message in (
        ([1, 1], [0.0, 0.0], "0.weight_quantizer.outliers.positions must ascend within the weight"),
        ([3, 384], [0.0, 0.0], "outliers.positions must ascend within the weight"),
        ([-1, 3], [0.0, 0.0], "outliers.positions must ascend within the weight"),
        ([1, 3], [0.0, torch.nan], "outliers.values must be finite"),
    ):
        held = Outliers(torch.tensor(positions), torch.tensor(values))
        model[0].weight_quantizer.outliers = held
        with pytest.raises(ValueError, match=re.escape(message)):
            check_loaded(model)


def test_options_are_checked_and_an_error_leaves_no_outliers():
    for method in (GWQ, PreQuant):
        with pytest.raises(ValueError, match="share must be between 0 and 1, got 1"):
            method(share=1)
    model = small()
    with pytest.raises(ValueError, match="was reached"):
        qt.quantize(model, data=[torch.randn(3, 16)], methods=["gwq"], overrides={"*": None})
    assert type(model[0]) is nn.Linear
    assert not weight_quantizers_of(model)


def weight_quantizers_of(model):
    return [name for name, _ in model.named_modules() if "quantizer" in name]
