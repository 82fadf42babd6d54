"""The program of PyTorch computes what the model simulates, and compiles to integer kernels."""

import pytest
import torch
from models import shallow
from torch import nn

import quanttune as qt
from quanttune.deploy.onnx_model import has_vnni
from quanttune.fake_quantizer import integer_range
from quanttune.quantization.state import quantizers

PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
CASES = [("vit", 8, "linear"), ("vit", 6, "full"), ("bert", 8, "full"), ("bert", 6, "linear")]


class Pixels(nn.Module):
    """A convolution, a Linear of rows without a bias, and one of them that ends the model."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.hidden = nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, images):
        return self.head(self.hidden(self.patches(images).flatten(1)).relu())


def quantized(name, bits, coverage):
    """Return a model, its example and the mean error of what it computed in float."""
    example = shallow(name)
    model = example.model
    exact = example.logits()
    qt.quantize(model, bits, coverage=coverage, data=[example.inputs])
    return model, example, error(exact, example.logits())


def error(one, other):
    return (one - other).abs().mean()


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("name", "bits", "coverage"), CASES, ids=str)
@torch.no_grad()
def test_the_program_computes_the_simulation(name, bits, coverage):
    """Of all values one or another code may differ, which changes those behind it."""
    model, example, lost = quantized(name, bits, coverage)
    program = qt.export_torch(model, example.inputs)
    rows = slice(3)  # another batch
    actual = example.logits(program.module(), rows)
    assert error(actual, example.logits(rows=rows)) < lost / 20
    found = targets(program)
    assert not any("quanttune" in target for target in found)
    products = (nn.Linear, nn.Conv2d) if coverage == "full" else nn.Linear
    weights = sum(isinstance(module, products) for module in model.modules())
    assert found.count("quantized_decomposed.dequantize_per_channel.default") == weights
    roundings = found.count("quantized_decomposed.quantize_per_tensor.default")
    assert roundings == len(quantizers(model))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 5])
@torch.no_grad()
def test_codes_are_those_of_the_grid(bits, symmetric):
    """Beyond the range too; values at the border of two codes are left out."""
    model, rows = nn.Sequential(nn.Linear(6, 6)).eval(), torch.randn(8, 6) + 0.5
    qt.quantize(model, bits, coverage="linear", symmetric=symmetric, data=[rows])
    program = qt.export_torch(model, rows)
    (node,) = program.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
    )
    x = torch.linspace(-9, 9, 6001)
    (quantizer,) = quantizers(model).values()
    steps = x.double() / quantizer.scale.double()
    expected = (steps.round() + quantizer.zero).clamp(*integer_range(bits))
    assert (quantizer.zero == 0) == symmetric
    away = (steps - steps.floor() - 0.5).abs() > 1e-4
    assert away.double().mean() > 0.99
    assert torch.equal(node.target(x, *node.args[1:])[away].double(), expected[away])


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "tensor"},
        {"symmetric": False},
        {"weight_bits": 4},
        {"weight_bits": 12},
        {"bits": 12},
        {"coverage": "linear"},  # the last product is what the program returns
    ],
    ids=str,
)
@torch.no_grad()
def test_all_schemes_run_as_simulated(options, tmp_path):
    model, images = Pixels().eval(), torch.randn(4, 3, 4, 4)
    exact = model(images)
    qt.quantize(model, data=[images], **{"coverage": "full", **options})
    program = qt.export_torch(model, images)
    assert ("quanttune.fake_quant.default" in targets(program)) == (options.get("bits") == 12)
    torch.export.save(program, tmp_path / "model.pt2")
    for module in (program.module(), torch.export.load(tmp_path / "model.pt2").module()):
        for batch in (images, images[:1], torch.randn(7, 3, 4, 4)):
            lost = error(exact, model(images))
            assert error(module(batch), model(batch)) < lost / 20


def test_the_model_is_what_it_was():
    model, images = Pixels().eval(), torch.randn(4, 3, 4, 4)
    qt.quantize(model, data=[images])
    before, expected = [vars(module).keys() for module in model.modules()], model(images)
    qt.export_torch(model, images)
    assert [vars(module).keys() for module in model.modules()] == before
    assert torch.equal(model(images), expected)
    assert model(images).requires_grad


def test_models_that_are_not_ready_are_refused():
    with pytest.raises(ValueError, match="Pixels is not quantized"):
        qt.export_torch(Pixels(), torch.randn(4, 3, 4, 4))


@torch.no_grad()
def test_linear_modules_compile_to_integer_kernels():
    """Takes half a minute: one kernel after another goes through a C++ compiler."""
    pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    model, example, lost = quantized("vit", 8, "linear")
    program = qt.export_torch(model, example.inputs).module()
    with config.patch(freezing=True):
        actual, (code, *_) = run_and_get_code(torch.compile(program), example.inputs)
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert code.count("onednn.qlinear_pointwise") == linear
    if has_vnni() is not False:  # else oneDNN lets products of 8 bits saturate
        assert error(actual, example.logits()) < lost / 20


def executorch(model, inputs):
    return qt.export_torch(model, inputs, target="executorch")


@pytest.mark.parametrize("name", ["vit", "bert"])
@torch.no_grad()
def test_what_executorch_gets_is_made_of_constants(name):
    """It packs weights before anything runs, and takes aten.linear for a product."""
    model, example, _ = quantized(name, 8, "full")
    program = executorch(model, example.inputs)
    inputs = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    weights = program.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.dequantize_per_channel.default
    )
    assert weights
    for node in weights:
        assert {argument.name for argument in node.args[:3]} <= inputs
        assert all(product.target in PRODUCTS for product in node.users)


@pytest.mark.parametrize(
    ("coverage", "options", "message"),
    [
        ("linear", {}, r"hidden.weight \(2 such\) is not. Quantize with coverage 'full_no"),
        ("full", {"overrides": {"head.output_quantizer": None}}, r"head.weight \(1 such\) is not"),
        ("full", {"bits": 6}, r"rounds to 8 bits, .* patches.input_quantizer has 6"),
        ("full", {"bits": 12}, r"rounds to 8 bits, .* patches.input_quantizer has 12"),
    ],
    ids=str,
)
def test_what_executorch_would_compute_in_float_is_refused(coverage, options, message):
    model, images = Pixels().eval(), torch.randn(4, 3, 4, 4)
    qt.quantize(model, data=[images], coverage=coverage, **options)
    with pytest.raises(ValueError, match=message):
        executorch(model, images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "coreml"}, "target must be one of inductor, executorch, litert, got 'coreml'"),
        ({"target": "executorch", "dynamic": {0: "batch"}}, "dynamic must be empty"),
    ],
    ids=str,
)
def test_targets_that_are_not_known_are_refused(options, message):
    model, images = Pixels().eval(), torch.randn(4, 3, 4, 4)
    qt.quantize(model, data=[images], coverage="full")
    with pytest.raises(ValueError, match=message):
        qt.export_torch(model, images, **options)


@torch.no_grad()
def test_packed_projections_keep_a_scale_per_output():
    """Those of nn.MultiheadAttention, which are (3 * width, width)."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    rows = torch.randn(4, 5, 8)
    exact = model(rows)
    qt.quantize(model, coverage="linear", data=[rows])
    program = qt.export_torch(model, rows)
    assert error(program.module()(rows), model(rows)) < error(exact, model(rows)) / 20


@torch.no_grad()
def test_what_litert_gets_rounds_floats_to_the_codes():
    """Its converter takes no codes; those that it computes are the weight's."""
    model, example, _ = quantized("vit", 8, "full_no_softmax")
    stored = executorch(model, example.inputs)
    program = qt.export_torch(model, example.inputs, target="litert")
    assert torch.equal(example.logits(program.module()), example.logits(stored.module()))
    assert not any(tensor.dtype == torch.int8 for tensor in program.state_dict.values())
    found = targets(program)
    weights = found.count("quantized_decomposed.quantize_per_channel.default")
    assert weights == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in model.modules())


@torch.no_grad()
def test_class_tokens_keep_their_values_beside_codes_in_litert():
    """It puts codes side by side, all of one grid: a ViT's class token would become 0."""
    model, example, _ = quantized("vit", 8, "full_no_softmax")
    program = qt.export_torch(model, example.inputs, target="litert")
    assert "aten.cat.default" not in targets(program)
    assert targets(program).count("aten.constant_pad_nd.default") == 2
    assert "aten.cat.default" in targets(executorch(model, example.inputs))
    assert torch.equal(example.logits(program.module()), example.logits())


class Halves(nn.Module):
    """Concatenates three parts of two grids along any axis, and two of one grid."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        first, second = self.first(x), self.second(x)
        mixed = torch.cat([first, second[:, :1], second], self.axis) if self.axis == 1 else None
        mixed = torch.cat([first, second], self.axis) if mixed is None else mixed
        return mixed.sum(), torch.cat([first[:, :1], first[:, 1:]], 1)


@pytest.mark.parametrize("axis", [0, 1, -1])
@torch.no_grad()
def test_what_is_concatenated_is_equal_on_every_axis(axis):
    model, rows = Halves(axis).eval(), torch.randn(3, 4, 4)
    qt.quantize(model, coverage="full", data=[rows])
    program = qt.export_torch(model, rows, target="litert")
    assert targets(program).count("aten.cat.default") == 1  # of one grid
    for found, expected in zip(program.module()(rows), model(rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_litert_would_compute_in_float_is_refused():
    model, images = Pixels().eval(), torch.randn(4, 3, 4, 4)
    options = {"overrides": {"head.output_quantizer": None}}
    qt.quantize(model, data=[images], coverage="full", **options)
    with pytest.raises(ValueError, match=r"head.weight \(1 such\) is not"):
        qt.export_torch(model, images, target="litert")


def test_a_rounded_softmax_is_refused_for_litert():
    model, example, _ = quantized("vit", 8, "full")
    with pytest.raises(ValueError, match=r"steps of 1/256 only, and .* 'full_no_softmax'"):
        qt.export_torch(model, example.inputs, target="litert")
