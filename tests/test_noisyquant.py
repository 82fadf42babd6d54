"""NoisyQuant: dither of an input by hand, what it costs, and that biases take it out again."""

import copy

import pytest
import torch
from equalized import rounded_names
from models import MODELS, Example, Shared, gpt2, shallow
from oracle import assert_same_bits
from torch import nn

import quanttune as qt
from quanttune.deploy.integer_weights import integer_weights
from quanttune.deploy.onnx_model import read
from quanttune.deploy.products import explain
from quanttune.quantization.channel_grids import NoisyQuantizer
from quanttune.quantization.methods import NoisyQuant
from quanttune.quantization.other_grid import put
from quanttune.quantization.running import forward_batches
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers

EXAMPLES = {
    **{name: lambda name=name: shallow(name) for name in MODELS},
    "gpt2": gpt2,
    "shared": lambda: Example(Shared(), torch.randn(16, 8), torch.zeros(16).long(), ("head",)),
}


def noisy_grid(noise, bits=4, scale=1.0):
    grid = NoisyQuantizer(bits, "input", torch.device("cpu"), len(noise))
    grid.noise, grid.scale, grid.calibrated = torch.tensor(noise), torch.tensor(scale), True
    return grid


def quantized(name="vit", methods=("noisyquant",), **options):
    """Return an example, and its model quantized."""
    torch.manual_seed(0)
    example = EXAMPLES[name]()
    options = {"bits": 6, "coverage": "linear", **options}
    model = copy.deepcopy(example.model).eval()
    return example, qt.quantize(model, methods=methods, data=[example.inputs], **options)


# ------------------------------------------------------------------ the grid


def test_by_hand():
    """Steps of 1: 0.3 + 0.25 becomes 1, 0.3 - 0.25 becomes 0, 9 is clipped to 7 in either case."""
    grid = noisy_grid([0.25, -0.25])
    assert torch.equal(grid.round(torch.tensor([[0.3, 0.3], [9.0, 9.0]])),
                       torch.tensor([[0.75, 0.25], [6.75, 7.25]]))  # fmt: skip
    with grid.keeping():
        assert torch.equal(grid.round(torch.tensor([[0.3, 0.3]])), torch.tensor([[1.0, 0.0]]))
    assert grid.round(torch.tensor([[0.3, 0.3]])).tolist() == [[0.75, 0.25]]


def test_the_error_of_any_constant_is_a_twelfth_of_a_squared_step():
    """Subtractive dither: noise of half a step to either side makes errors uniform."""
    step = 0.7
    noise = ((torch.rand(400_000) - 0.5) * step).tolist()
    grid = noisy_grid(noise, 8, step)
    for at in (0.0, 0.2, 0.31, 0.5):
        x = torch.full((len(noise),), at * step)
        error = (grid.round(x) - x).double()
        assert error.square().mean().item() / step**2 == pytest.approx(1 / 12, rel=0.01)
        assert abs(error.mean().item()) < 0.01 * step


def test_the_gradient_goes_through_and_stops_where_it_is_clipped():
    x = torch.tensor([[0.3, 9.0]], requires_grad=True)
    (noisy_grid([0.25, -0.25]).round(x) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [[2.0, 0.0]]


# ------------------------------------------------------------------ what is searched


def inputs_of(model, names, x):
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, args[0])
        )
        for name in names
    ]
    forward_batches(model, [x])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_no_product_is_worse_than_with_the_calibrated_range(name, bits):
    example, ours = quantized(name, bits=bits)
    _, plain = quantized(name, methods=(), bits=bits)
    exact = example.model.eval()
    names = rounded_names(ours)
    given = inputs_of(exact, names, example.inputs)
    better = 0
    groups = {}
    for name in names:  # those that are given the same tensor are searched together
        groups.setdefault(given[name].data_ptr(), []).append(name)
    for members in groups.values():
        losses = [
            sum(
                (model.get_submodule(one)(given[one]) - exact.get_submodule(one)(given[one]))
                .double().square().sum().item()
                for one in members
            )
            for model in (ours, plain)
        ]  # fmt: skip
        assert losses[0] <= losses[1] * (1 + 1e-6), members
        better += losses[0] < 0.95 * losses[1]
    assert better >= 2


def test_peaks_between_codes_are_what_it_is_for():
    """Nearly all values are 0.4 of a step, as behind a GELU: they round to 0, and all is lost."""
    torch.manual_seed(0)
    x = torch.full((64, 256), 0.4) + 0.02 * torch.randn(64, 256)
    x[0] = 7.0
    model = nn.Sequential(nn.Linear(256, 32))
    errors = []
    for methods in ([], ["noisyquant"]):
        options = {"coverage": "linear_inputs", "weight_bits": 16, "methods": methods}
        ours = qt.quantize(copy.deepcopy(model), 4, data=[x], **options)
        errors.append((ours(x) - model(x)).square().mean().item())
    assert errors[1] < errors[0] / 5


def test_layers_that_are_given_the_same_tensor_have_the_same_noise():
    _, model = quantized("opt", bits=4)
    attention = model.model.decoder.layers[0].self_attn
    noises = [
        getattr(attention, name).input_quantizer.noise for name in ("q_proj", "k_proj", "v_proj")
    ]
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2])
    assert noises[0].abs().max() > 0


# ------------------------------------------------------------------ with all else


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
@pytest.mark.parametrize("methods", [["noisyquant"], ["smoothquant", "noisyquant", "erq"]])
def test_it_is_saved_and_loaded(name, methods, tmp_path):
    example, model = quantized(name, methods)
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(EXAMPLES[name]().model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(again), example.logits(model))
    assert describe(again) == describe(model)
    assert_same_bits(again.state_dict(), model.state_dict())
    assert {row.grid for row in qt.summary(again).sites} == {"uniform", "noisy"}


def test_noise_of_a_file_is_checked():
    _, model = quantized()
    (grid, *_) = (q for q in quantizers(model).values() if q.grid == "noisy")
    grid.noise[0] = torch.nan
    with pytest.raises(ValueError, match=r"x\.noise must be finite"):
        grid.check_loaded("x")


@pytest.mark.parametrize("method", ["bias_correction", "gptq", "erq"])
def test_methods_that_round_weights_see_the_noise(method):
    """The input is on no grid of one scale: what makes up for its error does better than alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    x = nn.functional.gelu(torch.randn(600, 16) @ torch.randn(16, 16))
    errors = []
    for methods in (["noisyquant", method], ["noisyquant"], [method]):
        options = {"coverage": "linear_inputs", "weight_bits": 3, "methods": methods}
        ours = qt.quantize(copy.deepcopy(model), 3, data=list(x.split(300)), **options)
        errors.append((ours(x) - model(x)).square().mean().item())
    assert errors[0] < min(errors[1:])


def test_scales_are_learned_with_the_noise_in_its_place():
    example, model = quantized()
    before = example.logits(model)
    scales = qt.learn_scales(model)
    assert torch.equal(example.logits(model), before)
    example.task_loss(model).backward()
    assert all(scale.grad is not None for scale in scales)
    with torch.no_grad():
        for scale in scales:
            scale.mul_(1.01)
    learned = example.logits(model)
    qt.freeze_scales(model)
    assert torch.equal(example.logits(model), learned)
    assert not torch.equal(learned, before)


# ------------------------------------------------------------------ files


def test_what_a_file_multiplies_is_what_the_simulation_does():
    """W (Q(x + n) - n) + b = W Q(x + n) + (b - W n); no bias is one of 0."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4, bias=False)),
        torch.randn(16, 8),
    )
    qt.quantize(model, 4, coverage="linear_inputs", data=[x])
    for name in ("0", "2"):
        grid = NoisyQuantizer.after(quantizers(model)[f"{name}.input_quantizer"], 8)
        grid.noise = torch.randn(8) * grid.scale
        put(model, f"{name}.input_quantizer", grid)

    def by_hand(layer, x):
        grid, weight = layer.input_quantizer, layer.weight_quantizer(layer.weight).double()
        noise, step = grid.noise.double(), grid.scale.double()
        codes = ((x + noise) / step).round().clamp(-8, 7)
        bias = 0 if layer.bias is None else layer.bias.double()
        folded = codes * step @ weight.T + (bias - weight @ noise)
        torch.testing.assert_close(folded, (codes * step - noise) @ weight.T + bias)
        return folded

    expected = by_hand(model[2], nn.functional.gelu(by_hand(model[0], x.double()))).float()
    simulated = model(x)
    with integer_weights(model):
        assert model[2].input_quantizer.keeps
        found = model(x)
    assert not model[2].input_quantizer.keeps
    for one in (simulated, found):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), simulated)


@pytest.mark.parametrize(
    ("name", "options", "act_dtype"),
    [
        ("vit", {"bits": 8, "coverage": "full"}, "uint8"),
        ("gpt2", {}, "int8"),
        ("shared", {"bits": 4, "coverage": "linear_inputs"}, "uint8"),
    ],
)
def test_an_onnx_file_has_the_same_codes(name, options, act_dtype, tmp_path):
    example, model = quantized(name, **options)
    noisy = {site for site, q in quantizers(model).items() if q.grid == "noisy"}
    assert noisy
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, example.inputs, path, act_dtype=act_dtype)
    found = qt.verify(path, model, [example.inputs])
    assert found.passed, str(found)
    assert "Add" in {node.op_type for node in read(path).graph.node}
    if act_dtype == "uint8":  # what ONNX Runtime multiplies on every processor
        layers = [p for p in explain(path).products if p.name.rsplit(".", 1)[0] in _layers(model)]
        assert layers
        assert all(product.is_integer for product in layers)


def _layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


REFUSALS = {
    "torch": lambda model, example, path: qt.export_torch(model, example.inputs),
    "compressed": lambda model, example, path: qt.export_compressed_tensors(model, path),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_other_files_are_refused_by_name(what, tmp_path):
    example, model = quantized("bert", bits=8, coverage="linear_inputs")
    with pytest.raises(ValueError, match=r"noisyquant rounds .* noisy grid.*without noisyquant"):
        REFUSALS[what](model, example, tmp_path / "files")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"symmetric": False}, "noisyquant needs constant symmetric grids"),
        ({"calibrator": "dynamic"}, "noisyquant needs constant symmetric grids"),
        ({"coverage": "weight_only"}, "noisyquant is for inputs of Linear modules, none of which"),
        ({"methods": ["erq", "noisyquant"]}, "comes before what rounds it: noisyquant, erq"),
    ],
)
def test_where_it_does_not_apply(options, message):
    with pytest.raises(ValueError, match=message):
        quantized(**options)
    with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
        NoisyQuant(samples=0)
