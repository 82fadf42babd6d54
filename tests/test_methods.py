"""Methods of quantize: what they are given, what they leave behind, and that models keep it."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from equalized import rounded_names
from models import MODELS, deit, gpt2
from oracle import assert_same_bits
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import quanttune as qt
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.quantization.methods import (
    ERQ,
    GPTQ,
    METHODS,
    AdaRound,
    Equalization,
    Method,
    Rounding,
)
from quanttune.quantization.running import forward_batches
from quanttune.quantization.saving.description import describe
from quanttune.quantization.simulation import quantizers
from quanttune.quantization.state import is_quantized, weight_quantizers

EXAMPLES = {**MODELS, "deit": deit, "gpt2": gpt2}
ROUNDINGS = [name for name, method in METHODS.items() if issubclass(method, Rounding)]
ROUNDINGS[ROUNDINGS.index("adaround")] = AdaRound(iterations=20)
IN_FLOAT = {"qera", "gwq", "prequant"}  # they add floats to the codes
EXPORTED = [name for name in ROUNDINGS if name not in IN_FLOAT]
OF_LAYERS = [name for name in ROUNDINGS if name != "apq_vit"]  # which is for blocks with attention
WIDTHS = {  # of activations, of weights
    "W8A8": (8, 8, "channel"),
    "W6A6": (6, 6, "channel"),
    "W4A4": (4, 4, "channel"),
    "W3A4": (4, 3, "channel"),
    "W4A4 per tensor": (4, 4, "tensor"),
}
each_rounding = pytest.mark.parametrize("method", ROUNDINGS)


def prepared(name: str):
    """Return an example whose model is in evaluation mode, and its batches."""
    example = EXAMPLES[name]()
    example.model.eval()
    return example, example.inputs.split(3)


def rounded(model: nn.Module, data, method: str | Method | None = "erq", **options) -> nn.Module:
    """Return a quantized copy of a model."""
    methods = [] if method is None else [method]
    options = {"bits": 4, "coverage": "linear", **options}
    return qt.quantize(copy.deepcopy(model), methods=methods, data=data, **options)


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("method", ["gptq", "erq"])  # bias correction has means to itself
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_end_on_a_constant_grid_and_outputs_are_nearer(name, width, method):
    example, data = prepared(name)
    bits, weight_bits, weights = WIDTHS[width]
    options = {"bits": bits, "weight_bits": weight_bits, "weights": weights}
    ours = rounded(example.model, data, method, **options)
    nearest = rounded(example.model, data, None, **options)
    layers = rounded_names(ours)
    assert len(layers) >= 4
    for name in layers:
        weight, quantizer = ours.get_submodule(name).weight, weight_quantizer(ours, name)
        assert torch.equal(quantizer(weight), weight)
        assert weight_quantizer(nearest, name).scale is None
        axis = quantizer.axis
        assert quantizer.scale.shape == (() if axis is None else weight.shape[axis : axis + 1])
    # ERQ treats layers apart; GPTQ gives each what those before it, rounded, make
    given = inputs_of(example.model if method == "erq" else ours, layers, example.inputs)
    assert given.keys() == set(layers)
    error = [
        sum(error_of(model, example.model, name, x, method) for name, x in given.items())
        for model in (ours, nearest)
    ]
    assert error[0] < error[1]


def weight_quantizer(model: nn.Module, name: str):
    return model.get_submodule(f"{name}.weight_quantizer")


def inputs_of(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
        for name in names
    ]
    forward_batches(model, [x])
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def error_of(model: nn.Module, before: nn.Module, name: str, x: Tensor, method: str) -> float:
    """Return the squared error of a layer's outputs; GPTQ takes rounded inputs as they are."""
    layer = model.get_submodule(name)
    expected = before.get_submodule(name)(x if method == "erq" else layer.input_quantizer(x))
    return (layer(x) - expected).double().square().sum().item()


@each_rounding
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_model_that_is_loaded_computes_the_same_bits(name, method, tmp_path):
    example, data = prepared(name)
    model = rounded(example.model, data, method, coverage="full_no_softmax")
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(EXAMPLES[name]().model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(again), example.logits(model))
    assert describe(again) == describe(model)
    name = method if isinstance(method, str) else method.name
    assert describe(again)["scheme"]["methods"] == [name]
    assert_same_bits(again.state_dict(), model.state_dict())


def test_a_model_of_transformers_keeps_its_grids(tmp_path):
    import quanttune.quantization.pretrained  # noqa: F401

    example, data = prepared("bert")
    model = rounded(example.model, data)
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(example.logits(again), example.logits(model))


def test_scales_can_be_learned_from_those_of_a_method():
    example, data = prepared("vit")
    model = rounded(example.model, data)
    before = example.logits(model)
    qt.learn_scales(model)
    assert torch.equal(example.logits(model), before)
    qt.freeze_scales(model)
    assert torch.equal(example.logits(model), before)


TO_NEAREST = {
    "vit": ["patch_embed.proj"],
    "opt": ["model.decoder.embed_tokens", "lm_head"],
    "gpt2": ["transformer.wte", "transformer.wpe", "lm_head"],
}


@each_rounding
@pytest.mark.parametrize("name", TO_NEAREST)
def test_tied_weights_embeddings_and_convolutions_are_rounded_to_nearest(name, method):
    example, data = prepared(name)
    model = rounded(example.model, data, method, coverage="full_no_softmax")
    nearest = [site for site, (_, q) in weight_quantizers(model).items() if q.scale is None]
    assert nearest == [f"{module}.weight_quantizer" for module in TO_NEAREST[name]]
    for module in TO_NEAREST[name]:
        weight = example.model.get_submodule(module).weight
        assert torch.equal(model.get_submodule(module).weight, weight)


def linear():
    """Return a Linear, and batches of correlated inputs."""
    x = torch.randn(60, 16) @ torch.randn(16, 16)
    return nn.Sequential(nn.Linear(16, 8)), x, x.split(40)


@pytest.mark.parametrize("method", [name for name in OF_LAYERS if name != "prequant"])
@pytest.mark.parametrize("option", [{"calibrator": "dynamic"}, {"symmetric": False}])
def test_activations_may_be_rounded_otherwise(option, method):
    model, _, data = linear()
    errors = []
    for way in (method, None):
        quantized = rounded(model, data, way, **option)
        errors.append(sum((quantized(x) - model(x)).square().sum().item() for x in data))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", [name for name in EXPORTED if name in OF_LAYERS])
def test_integers_of_an_exported_model_are_the_codes(method, tmp_path):
    model, x, data = linear()
    quantized = rounded(model, data, method, bits=8, weight_bits=4)
    qt.export_onnx(quantized, x, tmp_path / "model.onnx")
    (found,) = OnnxModel(tmp_path / "model.onnx")(x).values()
    torch.testing.assert_close(found, quantized(x).detach(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ what methods are given


@dataclass(frozen=True)
class Early(Equalization):
    """Notes what it is given, and doubles the weights of the head."""

    name = "early"
    seen: list = field(default_factory=list)

    def apply(self, model, scheme, data):
        self.seen.append((is_quantized(model), scheme.bits, list(data.batches), data.mask))
        model.head.weight.data.mul_(2)


@dataclass(frozen=True)
class Late(Rounding):
    """Notes what it is given, changes the weights of the head, and may fail."""

    name = "late"
    seen: list = field(default_factory=list)
    fails: bool = False

    def apply(self, model, scheme, data):
        scales = {name: q.scale.item() for name, q in quantizers(model).items()}
        self.seen.append((is_quantized(model), model.head.weight.clone(), scales))
        model.head.weight.data.zero_()
        model.head.weight_quantizer.scale = torch.ones(5)
        if self.fails:
            raise ValueError("late failed")


def test_equalizations_are_given_the_float_model_and_roundings_the_calibrated_one():
    example, data = prepared("vit")
    early, late = Early(), Late()
    head = example.model.head.weight.clone()
    model = qt.quantize(example.model, 5, methods=[early, early, late], data=data, mask=None)
    assert [(q, bits, mask) for q, bits, _, mask in early.seen] == [(False, 5, None)] * 2
    assert all(a is b for a, b in zip(early.seen[0][2], data, strict=True))
    (was_quantized, weight, scales), *_ = late.seen
    assert was_quantized
    assert torch.equal(weight, 4 * head)
    assert scales == {name: q.scale.item() for name, q in quantizers(model).items()}
    assert describe(model)["scheme"]["methods"] == ["early", "early", "late"]


@pytest.mark.parametrize(
    "method", [*(name for name in EXPORTED if name in OF_LAYERS), GPTQ(hessian="fisher")]
)
def test_a_layer_whose_input_stays_float_is_rounded_as_behind_a_very_fine_grid(method):
    example, data = prepared("vit")
    inputs = "blocks.*.mlp.fc2.input_quantizer"
    found, fine = (
        rounded(example.model, data, method, overrides={inputs: kept})
        for kept in (None, {"bits": 16})
    )
    for name, weight in found.named_parameters():
        if name.endswith("mlp.fc2.weight"):
            assert not torch.equal(weight, example.model.get_parameter(name))
        near = torch.isclose(weight, fine.get_parameter(name), rtol=1e-2, atol=1e-4)
        assert near.float().mean() > 0.95, name


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ([Early(), Late(fails=True)], {}, "late failed"),
        ([Early()], {"overrides": {"nothing": None}}, "override 'nothing' matches no"),
        (["erq"], {"data": []}, "data is empty"),
        (["erq"], {"overrides": {"blocks.*": None, "head": None}}, "was reached by data"),
        ([ERQ(damping=-1e9)], {}, "no Cholesky factor"),
        ([GPTQ(damping=-1e9)], {}, "no Cholesky factor"),
        (["erq"], {"data": (x for x in [])}, "several times: they need a list or a DataLoader"),
        (["gptq"], {"data": None, "calibrator": "dynamic"}, "got NoneType"),
        (["awe"], {}, "methods must be of .*gptq, .*erq, .*or objects such as .*, got 'awe'"),
        ("erq", {}, r"methods must be a list, such as \[\"erq\"\], got 'erq'"),
        (["gptq", ERQ()], {}, "gptq and erq both choose the codes of the weights"),
        (["gptq", Early()], {}, "comes before what rounds it: early, gptq"),
    ],
)
def test_what_cannot_be_applied_is_refused_and_changes_nothing(methods, options, message):
    example, data = prepared("vit")
    model, logits = example.model, example.logits()
    before = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        qt.quantize(model, 4, methods=methods, **{"data": data, **options})
    assert_same_bits(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(example.logits(), logits)


def test_a_training_model_stays_one_and_keeps_no_hooks():
    example, data = prepared("bert")
    plain = rounded(example.model, data, None)
    for method in ROUNDINGS:
        example.model.train()
        model = rounded(example.model, data, method)
        assert model.training
        assert all(q.enabled for _, q in weight_quantizers(model).values())
        for name, like in plain.named_modules():
            module = model.get_submodule(name)
            assert len(module._forward_hooks) == len(like._forward_hooks)
            assert len(module._forward_pre_hooks) == len(like._forward_pre_hooks)
