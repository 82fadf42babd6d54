"""What ONNX Runtime computes in integers, and the reasons for what it does not."""

import json
from functools import cache

import onnx
import pytest
import torch
from models import MODELS
from torch import nn
from typer.testing import CliRunner

import quanttune as qt
from quanttune import cli
from quanttune.deploy import onnx_graph, onnx_model, products
from quanttune.deploy.products import explain

PROBABILITIES = "its left operand, attention's probabilities, is not rounded: coverage='full'"
CONVOLVED = "convolves integers only where the output is rounded at once, to 8 bits"
INPUT, WEIGHT = "its input is ", "its weight is "
BOTH = "its left operand is not rounded; its right operand is not rounded"
WIDE = "rounded to more than 8 bits"
FLOAT = "not rounded"
PATCHES = "patch_embed.proj"
CASES = {  # how a ViT is quantized: its products in float, and why
    "all": ({"coverage": "full"}, {}),
    "probabilities": ({}, {"blocks.0.attn.matmul_1": PROBABILITIES}),
    "coverage": ({"coverage": "linear"}, {f"{PATCHES}.conv": INPUT + FLOAT}),
    "overrides": (
        {
            "coverage": "linear",
            "overrides": {
                "head": None,
                "*.fc1": {"bits": 16},
                "*.fc2.weight_quantizer": {"bits": 12},
                "*.attn.proj.weight_quantizer": None,
                "*key_quantizer": None,
                "*value_quantizer": {"bits": 9},
            },
        },
        {
            f"{PATCHES}.conv": INPUT + FLOAT,
            "head.gemm": INPUT + FLOAT,
            "blocks.0.mlp.fc1.matmul": INPUT + WIDE,
            "blocks.0.mlp.fc2.matmul": WEIGHT + WIDE,
            "blocks.0.attn.proj.matmul": WEIGHT + FLOAT,
            "blocks.0.attn.matmul": "its right operand is " + FLOAT,
            "blocks.0.attn.matmul_1": "its right operand is " + WIDE,
        },
    ),
}  # fmt: skip
NAMES = {
    *(
        f"blocks.0.{name}.matmul"
        for name in ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ),
    "blocks.0.attn.matmul_1",
    f"{PATCHES}.conv",
}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Return a function that exports a case, once."""

    @cache
    def exported(case):
        torch.manual_seed(0)
        options, _ = CASES[case]
        example = MODELS["vit"]()
        model = example.model.eval()
        qt.quantize(model, data=[example.inputs], **options)
        path = tmp_path_factory.mktemp(case) / "vit.onnx"
        qt.export_onnx(model, example.inputs, path, dynamic={})
        return path

    return exported


@pytest.mark.parametrize("case", CASES)
def test_products_in_float_have_their_reason(case, export):
    _, expected = CASES[case]
    explanation = explain(export(case))
    remarks = {p.name: p.remark for p in explanation.products if not p.is_integer}
    assert remarks.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in remarks[name], name
    head = "head.gemm" if "head.gemm" in expected else "head.matmul"
    assert {product.name for product in explanation.products} == {*NAMES, head}
    assert all(product.remark is None for product in explanation.products if product.is_integer)


class Fork(nn.Module):
    """Two Linear modules on one input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.left(x) + self.right(x).tanh()


@pytest.mark.parametrize("act_dtype", ["uint8", "int8"])
def test_products_of_one_input_are_integers(act_dtype, tmp_path):
    model, x = Fork().eval(), torch.randn(4, 5, 8)
    qt.quantize(model, coverage="full", data=[x])
    qt.export_onnx(model, x, tmp_path / "fork.onnx", act_dtype=act_dtype)
    assert [product.remark for product in explain(tmp_path / "fork.onnx").products] == [None, None]


def test_int8_codes_that_two_products_read_keep_them_in_float(tmp_path, monkeypatch):
    """As other exporters write them; ONNX Runtime makes uint8 of int8 codes of one reader only."""
    monkeypatch.setattr(onnx_graph, "copy_roundings", lambda _: None)
    model, x = Fork().eval(), torch.randn(4, 5, 8)
    qt.quantize(model, coverage="linear", data=[x])
    qt.export_onnx(model, x, tmp_path / "fork.onnx", act_dtype="int8")
    remarks = [product.remark for product in explain(tmp_path / "fork.onnx").products]
    assert len(remarks) == 2
    assert all("export it with act_dtype='uint8'" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("options", "is_integer", "remark"),
    [
        ({}, True, None),
        ({"weight_bits": 12}, False, WEIGHT + WIDE),
        ({"bits": 6}, False, CONVOLVED),
        ({"bits": 6, "overrides": {"0.output_quantizer": {"bits": 8}}}, True, None),
        ({"overrides": {"0.output_quantizer": None}}, False, CONVOLVED),
        ({"overrides": {"0.input_quantizer": None}}, False, INPUT + FLOAT),
    ],
    ids=str,
)
def test_convolutions(options, is_integer, remark, tmp_path):
    model, images = nn.Sequential(nn.Conv2d(3, 8, 2, 2)).eval(), torch.randn(4, 3, 8, 8)
    qt.quantize(model, coverage="full", data=[images], **options)
    qt.export_onnx(model, images, tmp_path / "model.onnx")
    (product,) = explain(tmp_path / "model.onnx").products
    assert product.name == "0.conv"
    assert product.is_integer == is_integer
    assert product.remark == remark or remark in product.remark


def test_roundings_that_are_left_alone_are_counted(export):
    """With coverage linear, all that is rounded is multiplied: nothing goes back to float."""
    lean = explain(export("coverage")).roundings
    full = explain(export("all")).roundings
    assert lean["DequantizeLinear"] == 0 < full["DequantizeLinear"]
    assert 0 < lean["QuantizeLinear"] < full["QuantizeLinear"]


def test_a_product_that_is_lost_is_not_guessed_at(tmp_path):
    """ONNX Runtime computes the product of two constants once, and keeps what comes out."""
    weight = onnx.numpy_helper.from_array(torch.randn(4, 4).numpy(), "weight")
    square = onnx.helper.make_node("MatMul", ["weight", "weight"], ["square"])
    product = onnx.helper.make_node("MatMul", ["x", "square"], ["y"], "named")
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [2, 4]) for name in "xy")
    graph = onnx.helper.make_graph([square, product], "g", [x], [y], [weight])
    opset = onnx.helper.make_operatorsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "a")
    lost, kept = explain(tmp_path / "a").products
    assert (lost.name, lost.operator, lost.is_integer) == ("square", None, False)
    assert "does not name it" in lost.remark
    assert (kept.name, kept.operator, kept.remark) == ("named", "MatMul", BOTH)


def test_a_file_that_no_message_holds_is_refused(export, monkeypatch):
    monkeypatch.setattr(products, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"vit.onnx is larger than 2 GB: explain"):
        explain(export("all"))


def test_a_file_without_products_is_refused(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "relu.onnx")
    with pytest.raises(ValueError, match=r"relu.onnx has no product: no MatMul, Gemm, Conv"):
        explain(tmp_path / "relu.onnx")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("flags : sse2 avx512_vnni", True), ("flags : sse2 avx2", False), ("Features : asimd", None)],
)
def test_vnni(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(onnx_model, "CPUINFO", tmp_path / "cpuinfo")
    assert products.has_vnni() is expected


def test_the_doctor_prints_counts_and_reasons(export, tmp_path, monkeypatch):
    path = export("probabilities")
    monkeypatch.setattr(products, "has_vnni", lambda: False)
    arguments = ["doctor", "--onnx", str(path), "--json", str(tmp_path / "a.json")]
    said = CliRunner().invoke(cli.app, arguments).output
    assert f"{path}: 7 of 8 products in integers" in said
    assert "no VNNI: products of int8 saturate here" in said
    in_options = PROBABILITIES.replace("coverage='full'", "--coverage full")
    assert f"blocks.0.attn.matmul_1 (MatMul): {in_options}" in said
    assert said.count("blocks.") == 1
    found = json.loads((tmp_path / "a.json").read_text())["onnx"]
    assert f"{found['roundings']['QuantizeLinear']} QuantizeLinear, " in said
    assert [p["name"] for p in found["products"] if p["remark"]] == ["blocks.0.attn.matmul_1"]
