"""Exports of small models: types, widths, layouts of weights, sizes of inputs, refusals."""

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from models import MODELS, Shared
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import quanttune as qt
from quanttune.deploy import external_data
from quanttune.deploy.integer_weights import integer_weights
from quanttune.quantization.state import quantizers, weight_quantizers


class Words(nn.Module):
    """An embedding, a transposed Linear and a Linear without a bias."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.mix = Conv1D(6, 8)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, words):
        return self.head(self.mix(self.table(words)).tanh())


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2, 2)

    def forward(self, images):
        return self.patches(images).flatten(2)


class Twice(nn.Module):
    """Two Linears of one tensor, of which the second is called again."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x).tanh() + self.two(x).tanh())


INPUTS = {
    Words: torch.arange(12).reshape(2, 6) % 9,
    Pixels: torch.linspace(-2, 2, 96).reshape(2, 3, 4, 4),
    Shared: torch.linspace(-2, 2, 24).reshape(3, 8),
}


def quantized(kind, **options):
    model = kind().eval()
    return qt.quantize(model, **{"data": [INPUTS[kind]], "coverage": "full", **options})


@torch.no_grad()
def assert_runs_alike(model, path, inputs, **options):
    """Compare with the simulation; a code that flips is worth a step."""
    (name,) = (value.name for value in onnx.load(path).graph.input)
    (actual,) = onnx_files.run(path, {name: inputs}, **options).values()
    expected = model(inputs).numpy()
    steps = [quantizer.scale.item() for quantizer in quantizers(model).values()]
    near = np.abs(actual - expected) < 1e-5
    assert near.mean() > 0.9
    assert np.abs(actual - expected).max() < 2 * max(steps)


@pytest.mark.parametrize("act_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("bits", [8, 5])
def test_zero_points_are_ours(bits, act_dtype, tmp_path):
    model = quantized(Words, bits=bits, symmetric=False)
    path = tmp_path / "affine.onnx"
    qt.export_onnx(model, INPUTS[Words], path, act_dtype=act_dtype)
    roundings, grids = onnx_files.roundings(path), quantizers(model)
    x = np.linspace(-5, 5, 501, dtype=np.float32)
    found = onnx_files.run(roundings, dict.fromkeys(onnx_files.sites(roundings), x))
    center = 128 if act_dtype == "uint8" else 0
    zeros = set()
    for name, codes in found.items():
        grid = grids[name.removesuffix(onnx_files.CODES)]
        steps = np.rint(x / grid.scale.numpy()) + (zero := int(grid.zero_point))
        # below 8 bits, the codes are those of the narrower grid in the middle of the type
        expected = np.clip(steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + center
        np.testing.assert_array_equal(codes, expected)
        zeros.add(zero)
    assert len(zeros) > 1
    # of int8 ONNX Runtime's products saturate on processors without VNNI
    assert_runs_alike(model, path, INPUTS[Words], as_written=act_dtype == "int8")


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("weight_bits", [4, 8, 12])
@pytest.mark.parametrize("kind", INPUTS)
def test_integer_weights_are_those_of_the_simulation(kind, weight_bits, weights):
    model = quantized(kind, weight_bits=weight_bits, weights=weights)
    expected = {
        name.removesuffix(".weight_quantizer"): quantizer(module.weight)
        for name, (module, quantizer) in weight_quantizers(model).items()
    }
    classes = [type(module) for module in model.modules()]
    with torch.no_grad(), integer_weights(model):
        for name, weight in expected.items():
            module = model.get_submodule(name)
            held = module.weight_quantizer
            assert held.codes.dtype == (torch.float32 if weight_bits > 8 else torch.int8)
            is_linear = isinstance(kind().get_submodule(name), nn.Linear)
            assert torch.equal(held().t() if is_linear else held(), weight)
            if kind is Words and name == "table":
                assert torch.equal(module(INPUTS[Words]), F.embedding(INPUTS[Words], weight))
    assert [type(module) for module in model.modules()] == classes
    for name, weight in expected.items():
        assert torch.equal(
            weight,
            weight_quantizers(model)[f"{name}.weight_quantizer"][1](
                model.get_submodule(name).weight
            ),
        )


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("bits", "weight_bits"), [(8, 4), (6, 12), (12, 8)])
def test_all_widths_run_as_simulated(kind, bits, weight_bits, tmp_path):
    model = quantized(kind, bits=bits, weight_bits=weight_bits)
    qt.export_onnx(model, INPUTS[kind], tmp_path / "model.onnx", dynamic={})
    assert_runs_alike(model, tmp_path / "model.onnx", INPUTS[kind])
    rounds = onnx_files.operators(tmp_path / "model.onnx")["QuantizeLinear"]
    assert (rounds == 0) == (bits > 8)


def test_weights_are_stored_as_integers(tmp_path):
    model = quantized(Words)
    qt.export_onnx(model, [INPUTS[Words], "labels are left out"], tmp_path / "model.onnx")
    stored = onnx_files.tensors(tmp_path / "model.onnx")
    shapes = {"table": (9, 8), "mix": (8, 6), "head": (6, 4)}
    for name, shape in shapes.items():
        codes = stored[f"{name}.weight_quantizer.codes"]
        assert (codes.dtype, codes.shape) == (np.int8 if name == "table" else np.uint8, shape)
    floats = [array for array in stored.values() if array.dtype == np.float32]
    assert max(array.size for array in floats) == 9  # the scales of the table
    counts = onnx_files.operators(tmp_path / "model.onnx")
    assert counts["DequantizeLinear"] == counts["QuantizeLinear"] + 2  # none of the table


@pytest.mark.parametrize(
    ("act_dtype", "opset"),
    [("uint8", 18), ("uint8", 21), ("int8", 20)],
)
def test_types_and_opsets_run_as_simulated(act_dtype, opset, tmp_path):
    model = quantized(Shared, bits=7)
    path = tmp_path / "model.onnx"
    options = {"act_dtype": act_dtype, "opset": opset, "dynamic": {}}
    qt.export_onnx(model, INPUTS[Shared], path, **options)
    assert onnx.load(path).opset_import[0].version == opset
    zero_points = {
        stored.item()
        for name, stored in onnx_files.tensors(path).items()
        if stored.dtype == act_dtype and stored.ndim == 0
    }
    assert zero_points == {128 if act_dtype == "uint8" else 0}
    assert_runs_alike(model, path, INPUTS[Shared])


def test_calls_of_one_module_are_numbered(tmp_path):
    qt.export_onnx(quantized(Shared), INPUTS[Shared], tmp_path / "model.onnx")
    sites = onnx_files.sites(onnx.load(tmp_path / "model.onnx"))
    assert sites.count("shared.output_quantizer") == 1
    assert {"shared.output_quantizer.codes_1", "shared.output_quantizer.codes_2"} <= set(sites)


def test_calls_keep_their_numbers_where_sites_are_merged(tmp_path):
    x = torch.linspace(-3, 3, 24).reshape(3, 8)
    model = qt.quantize(Twice().eval(), coverage="linear", data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx")
    sites = onnx_files.sites(onnx.load(tmp_path / "model.onnx"))
    assert "one.input_quantizer" in sites
    assert "two.input_quantizer" not in sites  # makes the same codes of the same tensor
    assert "two.input_quantizer.codes_1" in sites


class Scores(nn.Module):
    """Returns what it multiplies transposed, too, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        one, two = self.one(x).sigmoid(), self.two(x).sigmoid()
        return {"scores": one @ two.t(), "two": two}


@torch.no_grad()
def test_an_output_is_not_rounded_where_its_transpose_is(tmp_path):
    """ONNX Runtime 1.32 does that, of a Transpose in front of a QuantizeLinear."""
    model = qt.quantize(Scores().eval(), weight_bits=7, data=[INPUTS[Shared]])
    qt.export_onnx(model, INPUTS[Shared], tmp_path / "model.onnx")
    found = onnx_files.run(tmp_path / "model.onnx", {"x": INPUTS[Shared]})
    for name, expected in model(INPUTS[Shared]).items():
        np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-5)
    assert qt.verify(tmp_path / "model.onnx", model, [INPUTS[Shared]]).passed


def test_texts_of_any_length(tmp_path):
    model = quantized(Words)
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, {"words": INPUTS[Words]}, path, dynamic={0: "batch", 1: "tokens"})
    assert_runs_alike(model, path, INPUTS[Words][:1, :3])
    sizes = onnx.load(path).graph.output[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", "tokens", 4]


class Segments(nn.Module):
    """Looks up the first of more zeros than texts have words, as BERT does for its segments."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2, 8)
        self.register_buffer("zeros", torch.zeros(1, 80, dtype=torch.long))
        self.head = nn.Linear(8, 4)

    def forward(self, words):
        places = torch.arange(words.shape[1])[None]
        kinds = self.zeros.expand(1, -1).gather(1, places)
        return self.head(self.table(words) + self.table(kinds))


def test_nodes_that_cannot_be_folded_are_no_news(tmp_path, caplog):
    words = torch.arange(12).reshape(2, 6) % 2
    model = qt.quantize(Segments().eval(), 8, data=[words])
    qt.export_onnx(model, words, tmp_path / "m.onnx")
    assert "GatherElements" in [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert not [r.message for r in caplog.records if r.name.startswith("onnxscript")]
    assert_runs_alike(model, tmp_path / "m.onnx", words)


def test_large_tensors_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(external_data, "LARGEST", 100)
    model = qt.quantize(nn.Sequential(nn.Linear(8, 64)), data=[INPUTS[Shared]])
    qt.export_onnx(model, INPUTS[Shared], tmp_path / "model.onnx")
    (beside,) = external_data.tensor_files(tmp_path / "model.onnx")
    assert {*tmp_path.iterdir()} == {tmp_path / "model.onnx", beside}
    assert beside.name.startswith("model.onnx.")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert external_data.size_of(tmp_path / "model.onnx") == sum(sizes)
    assert_runs_alike(model, tmp_path / "model.onnx", INPUTS[Shared])


def test_training_mode_is_kept_and_dropout_is_not(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    qt.quantize(model, data=[INPUTS[Shared]])
    seen = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    qt.export_onnx(model, INPUTS[Shared], tmp_path / "model.onnx")
    assert all(module.training for module in model.modules())
    assert seen == [False]
    assert_runs_alike(model.eval(), tmp_path / "model.onnx", INPUTS[Shared])


def test_a_language_model_that_caches_returns_logits_alone(tmp_path):
    example = MODELS["opt"]()
    model = example.model.eval()
    model.config.use_cache = True
    qt.quantize(model, coverage="linear", data=[example.inputs])
    qt.export_onnx(model, example.inputs, tmp_path / "model.onnx", dynamic={})
    assert model.config.use_cache
    (output,) = onnx.load(tmp_path / "model.onnx").graph.output
    assert output.name == "logits"


def learning():
    model = quantized(Shared)
    qt.learn_scales(model)
    return model


def attached():
    model = quantized(Shared)
    qt.attach(model, total_steps=1)
    return model


REFUSED = {
    "Shared is not quantized": Shared,
    "is being tuned: detach": attached,
    "are being learned: call freeze_scales": learning,
    "quantize it with data": lambda: quantized(Shared, calibrator="dynamic", data=None),
    "must be float32: shared.weight is not": lambda: quantized(Shared).bfloat16(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_are_not_ready_are_refused(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        qt.export_onnx(REFUSED[message](), INPUTS[Shared], tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"opset": 17}, ValueError, "opset must be from 18 to 21 with uint8 activations, got 17"),
        ({"opset": 21, "act_dtype": "int8"}, ValueError, "from 18 to 20 with int8"),
        ({"act_dtype": "int4"}, ValueError, "act_dtype must be uint8 or int8 for onnxruntime"),
        ({"target": "openvino", "act_dtype": "uint8"}, ValueError, "must be int8 for openvino"),
        ({"target": "openvino", "opset": 21}, ValueError, "from 18 to 20 with int8"),
        ({"target": "onnx"}, ValueError, "target must be one of onnxruntime, .*, got 'onnx'"),
        ({"target": "ncnn"}, ValueError, "no ONNX file is written for ncnn: .* crashes"),
        ({"target": "litert"}, ValueError, "for litert: .* call export_torch"),
        ({"path": "none/model.onnx"}, FileNotFoundError, "there is no folder"),
        ({"path": "."}, IsADirectoryError, "path must be a file"),
        ({"example_inputs": torch.ones(1, 8)}, ValueError, r"dimension 0 \(batch\).* got 1"),
        ({"example_inputs": "text"}, TypeError, "must be tensors, got str"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(options, error, message, tmp_path):
    options = {"example_inputs": INPUTS[Shared], "path": "model.onnx", **options}
    options["path"] = tmp_path / options["path"]
    with pytest.raises(error, match=message):
        qt.export_onnx(quantized(Shared), **options)


@pytest.mark.parametrize(
    ("target", "code"), [("onnxruntime", "UINT8"), ("openvino", "INT8"), ("opencv", "UINT8")]
)
def test_a_target_decides_the_type_of_codes(target, code, tmp_path):
    qt.export_onnx(quantized(Shared), INPUTS[Shared], tmp_path / "model.onnx", target=target)
    tensors = onnx.load(tmp_path / "model.onnx").graph.initializer
    types = [t.data_type for t in tensors if t.name.endswith("weight_quantizer.codes")]
    assert types
    assert set(types) == {onnx.TensorProto.DataType.Value(code)}


def test_an_error_leaves_the_model_and_the_older_file_alone(tmp_path, monkeypatch):
    model = quantized(Shared)
    (tmp_path / "model.onnx").write_text("older")
    classes = [type(module) for module in model.modules()]
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qt.export_onnx(model, INPUTS[Shared], tmp_path / "model.onnx")
    assert [type(module) for module in model.modules()] == classes
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


def test_masks_and_labels_reach_the_file(tmp_path):
    example = MODELS["bert"]()
    model = example.model.eval()
    mask = torch.ones_like(example.inputs)
    mask[0, 4:] = 0
    batch = {"input_ids": example.inputs, "attention_mask": mask}
    qt.quantize(model, coverage="linear", data=[batch])
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, batch, path, dynamic={0: "batch", 1: "tokens"})
    mask[1, 2:] = 0
    shorter = {name: tensor[:, :5] for name, tensor in batch.items()}
    with torch.no_grad():
        expected = model(**shorter).logits
    logits = torch.from_numpy(onnx_files.run(path, shorter)["logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_used_without_its_module_is_exported(tmp_path):
    """As in BEiT and EVA02, whose biases are parameters of another module."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias = nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(8))
            self.own, self.last = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.qkv.weight, bias=self.bias) @ self.own)

    x = torch.randn(3, 5, 8)
    model = qt.quantize(Functional().eval(), 8, weight_bits=7, data=[x])
    qt.export_onnx(model, x, tmp_path / "m.onnx")
    # what the file says, whatever a processor's kernels do
    (actual,) = onnx_files.run(tmp_path / "m.onnx", {"x": x}, as_written=True).values()
    expected = model(x).detach()
    scale = quantizers(model)["last.output_quantizer"].scale.item()
    assert abs(actual - expected.numpy()).max() < 1.5 * scale  # a code at most
    assert (abs(actual - expected.numpy()) < 1e-5).mean() > 0.9


class Table(nn.Module):
    """Scores of queries and passages, of two dimensions, and a bias."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x):
        return self.one(x) @ self.two(x).t() + self.bias


@torch.no_grad()
def test_a_sum_of_two_dimensions_gets_no_third(tmp_path):
    x = torch.randn(5, 8)
    model = qt.quantize(Table().eval(), coverage="linear", data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx", dynamic={})
    (found,) = onnx_files.run(tmp_path / "model.onnx", {"x": x}).values()
    assert found.shape == (5, 5)
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)


@torch.no_grad()
def test_a_convolution_that_is_the_output_keeps_its_bias(tmp_path):
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2)).eval()
    overrides = {"1.output_quantizer": None}
    qt.quantize(model, 8, coverage="full", overrides=overrides, data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx")
    (found,) = onnx_files.run(tmp_path / "model.onnx", {"input": x}, as_written=True).values()
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)


@torch.no_grad()
def test_two_roundings_in_a_row_stay_two(tmp_path):
    """ONNX Runtime 1.32 makes one of them, on a third grid; learned scales differ like that."""
    x = torch.randn(8, 8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    qt.quantize(model, weight_bits=7, coverage="full", data=[x])
    model[1].input_quantizer.scale /= 3
    qt.export_onnx(model, x, tmp_path / "model.onnx")
    (found,) = onnx_files.run(tmp_path / "model.onnx", {"input": x}).values()
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-6)


@pytest.mark.parametrize("coverage", ["linear", "full"])
@torch.no_grad()
def test_files_of_fixed_sizes_multiply_integers_too(coverage, tmp_path):
    """ONNX Runtime 1.32 makes a Gemm of a product and its bias, where it knows their sizes."""
    x = torch.randn(2, 4, 8)
    layers = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)
    model = qt.quantize(nn.Sequential(*layers).eval(), 6, coverage=coverage, data=[x])
    for layer in layers[::2]:
        assert layer.bias.abs().max() > 0
    qt.export_onnx(model, x, tmp_path / "model.onnx", dynamic={})
    assert "0.bias" in onnx_files.tensors(tmp_path / "model.onnx")
    feeds, optimized = {"input": x}, tmp_path / "optimized.onnx"
    (found,) = onnx_files.run(tmp_path / "model.onnx", feeds, optimized).values()
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-6)
    counts = onnx_files.operators(optimized)
    assert counts["MatMulIntegerToFloat"] == 3
    assert not any(counts[kind] for kind in (*onnx_files.FLOAT_PRODUCTS, "QGemm"))


@torch.no_grad()
def test_a_product_that_a_model_clamps_from_one_side(tmp_path):
    """Behind it stands a Min or a Max alone."""

    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, input):
            return self.high(self.low(input).clamp(min=-0.1)).clamp(max=0.1)

    x = torch.randn(4, 3, 8)
    model = qt.quantize(Clamped().eval(), coverage="linear", data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx")
    (found,) = onnx_files.run(tmp_path / "model.onnx", {"input": x}).values()
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-6)
    assert found.max() == np.float32(0.1)


@torch.no_grad()
def test_biases_of_convolutions_in_float_are_not_rounded(tmp_path):
    """ONNX Runtime 1.32 rounds them between rounded tensors, to steps of both scales."""
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Linear(16, 4)).eval()
    model[0].bias.normal_()
    qt.quantize(model, 5, coverage="full", data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx")
    assert "0.bias" in onnx_files.tensors(tmp_path / "model.onnx")
    (found,) = onnx_files.run(tmp_path / "model.onnx", {"input": x}).values()
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-6)
    assert qt.verify(tmp_path / "model.onnx", model, [x]).passed
