"""Exported models in ONNX Runtime: codes and layers against the simulation, integer kernels."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_files
import pytest
import torch
from models import Example, shallow

import quanttune as qt
from quanttune.fake_quantizer import integer_range
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers

# in these coverages both operands of every product are rounded
CASES = [
    *(("vit", bits, coverage) for bits, coverage in ((8, "full"), (7, "linear"))),
    *(("bert", 7, "full"), ("opt", 8, "full"), ("opt", 6, "linear")),
    *(("swin", 8, "full"), ("deit", 7, "full")),
]
CENTER = 128


@dataclass
class Exported:
    """A quantized model, its file, and what each of its sites takes in for the example."""

    example: Example
    bits: int
    path: Path
    seen: dict[str, torch.Tensor]
    exact: torch.Tensor  # logits in float
    logits: torch.Tensor
    before: dict[str, torch.Tensor]

    def codes(self, site: str, x: np.ndarray) -> np.ndarray:
        """Round in numpy; its float32 quotient is the correctly rounded one."""
        scale = quantizers(self.example.model)[site].scale.numpy()
        return np.clip(np.rint(x / scale), *integer_range(self.bits)).astype(int) + CENTER


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    name, bits, coverage = request.param
    example = shallow(name)
    model = example.model
    with torch.no_grad():
        exact = example.logits()
    qt.quantize(model, bits, coverage=coverage, data=[example.inputs])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("export") / f"{name}.onnx"
    qt.export_onnx(model, example.inputs, path)
    seen = {}
    for site, quantizer in quantizers(model).items():
        quantizer.register_forward_pre_hook(
            lambda _, args, site=site: seen.__setitem__(site, args[0].clone())
        )
    with torch.no_grad():
        logits = example.logits()
    return Exported(example, bits, path, seen, exact, logits, before)


each_case = pytest.mark.parametrize("exported", CASES, indirect=True, ids=str)


def is_alone(model, site):
    """Tell whether a site is rounded without limits of its own."""
    return any(n.op_type == "QuantizeLinear" and n.input[0] == site for n in model.graph.node)


@each_case
def test_codes_are_ours_bit_for_bit(exported):
    """On identical inputs, those beyond the range too: scaled by 1.5 some are."""
    model = onnx_files.roundings(exported.path)
    # of fewer bits limits are left out where the tensor was rounded within the same ones before
    feeds = {
        site: (1 if exported.bits < 8 and is_alone(model, site) else 1.5)
        * exported.seen[site].numpy()
        for site in onnx_files.sites(model)
    }
    clipped, limits = False, {limit + CENTER for limit in integer_range(exported.bits)}
    for name, codes in onnx_files.run(model, feeds).items():
        site = name.removesuffix(onnx_files.CODES)
        expected = exported.codes(site, feeds[site])
        assert codes.dtype == np.uint8
        np.testing.assert_array_equal(codes, expected, err_msg=site)
        clipped |= bool({expected.min(), expected.max()} & limits)
    assert clipped


@each_case
def test_every_site_is_there(exported):
    """Or another one that makes the same codes of the same tensor: the exporter merges them."""
    there = set(onnx_files.sites(onnx.load(exported.path)))
    assert there <= set(exported.seen)
    for site, x in exported.seen.items():
        codes = exported.codes(site, x.numpy())
        twins = (exported.codes(other, exported.seen[other].numpy()) for other in there)
        assert site in there or any(np.array_equal(codes, twin) for twin in twins), site


@each_case
def test_each_layer_agrees_on_the_same_codes(exported):
    model = onnx_files.layers(exported.path)
    seen = {site: exported.seen[site].numpy() for site in onnx_files.sites(model)}
    feeds = {exported_input(exported): exported.example.inputs}
    for site, x in seen.items():
        feeds[f"{site}.fed"] = exported.codes(site, x).astype(np.uint8)
    outputs = onnx_files.run(model, feeds)
    for site, x in seen.items():
        codes = outputs.pop(site + onnx_files.CODES).astype(int)
        difference = np.abs(codes - exported.codes(site, x))
        assert (difference <= 1).mean() >= 0.999, site
        assert (difference == 0).mean() >= 0.99, site
    (logits,) = outputs.values()
    if exported.example.heads[0] + ".output_quantizer" not in exported.seen:
        torch.testing.assert_close(torch.from_numpy(logits), exported.logits, rtol=1e-5, atol=1e-5)


@each_case
def test_every_product_is_one_of_integers(exported, tmp_path):
    run_whole(exported, exported.example.inputs, tmp_path / "optimized.onnx")
    counts = onnx_files.operators(tmp_path / "optimized.onnx")
    linear = [m for m in exported.example.model.modules() if isinstance(m, torch.nn.Linear)]
    attentions = sum(q.kind == "probability" for q in quantizers(exported.example.model).values())
    assert attentions
    products = sum(counts[kind] for kind in onnx_files.INTEGER_PRODUCTS)
    assert products == len(linear) + 2 * attentions
    assert not any(counts[kind] for kind in onnx_files.FLOAT_PRODUCTS)
    assert not counts["QLinearSoftmax"]  # softmax is computed in float


@each_case
def test_another_batch_is_nearer_to_the_simulation_than_the_float_model_is(exported):
    """Where one code flips, others do behind it: logits of quantized models cannot be equal."""
    actual = run_whole(exported, exported.example.inputs[:3])
    error = (actual - exported.logits[:3]).abs().mean()
    assert error < (exported.exact - exported.logits)[:3].abs().mean()


@each_case
def test_the_file_says_what_it_is(exported):
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["quantization_config"]) == describe(exported.example.model)
    inputs, outputs = (
        [shape_of(v) for v in values] for values in (model.graph.input, model.graph.output)
    )
    example = exported.example
    assert inputs == [["batch", *example.inputs.shape[1:]]]
    assert outputs == [["batch", *exported.logits.shape[1:]]]
    name = "output" if isinstance(example.model(example.inputs), torch.Tensor) else "logits"
    assert [value.name for value in model.graph.output] == [name]
    assert str(Path(__file__).parent.parent).encode() not in exported.path.read_bytes()


@each_case
def test_the_model_is_what_it_was(exported):
    after = exported.example.model.state_dict()
    assert after.keys() == exported.before.keys()
    assert all(torch.equal(after[key], value) for key, value in exported.before.items())


def exported_input(exported):
    return onnx.load(exported.path).graph.input[0].name


def run_whole(exported, inputs, optimized=None):
    outputs = onnx_files.run(exported.path, {exported_input(exported): inputs}, optimized)
    return torch.from_numpy(*outputs.values())


def shape_of(value):
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
