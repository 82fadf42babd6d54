"""QERA and its special cases against the least squares that they claim to be."""

import copy

import pytest
import torch
from models import MODELS, shallow
from torch import Tensor, nn

import quanttune as qt
from quanttune.quantization.methods import QERA
from quanttune.quantization.methods.qera import WEIGHTINGS, InputSums, low_rank
from quanttune.quantization.saving.description import describe, from_description

SHARES = ("exact", "diagonal", "magnitude", "none")


def case(tokens: int = 300, columns: int = 12, outputs: int = 9) -> tuple[Tensor, Tensor]:
    """Return correlated inputs of channels of unlike size, and errors of a weight."""
    mixed = torch.randn(tokens, columns) @ torch.randn(columns, columns)
    x = mixed * torch.logspace(-1, 1.5, columns)
    return x.double(), torch.randn(outputs, columns).double()


def corrected(x: Tensor, errors: Tensor, rank: int, weighting: str) -> float:
    """Return the squared error of outputs that is left."""
    sums = InputSums(x.shape[1], x.device)
    for part in x.split(70):
        sums.add(part, part)
    down, up = low_rank(errors, *WEIGHTINGS[weighting](sums), rank)
    assert down.shape == (rank, x.shape[1])
    return float((x @ (errors - up @ down).T).square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_exact_is_the_best_there_is_and_channels_alone_are_better_than_nothing(rank):
    x, errors = case()
    left = {name: corrected(x, errors, rank, name) for name in SHARES}
    # the best product of the rank: the outputs' own singular values that are left over
    best = torch.linalg.svdvals(x @ errors.T)[rank:].square().sum().item()
    assert left["exact"] == pytest.approx(best, rel=1e-8)
    assert left["exact"] < left["diagonal"] < left["none"]
    assert left["exact"] < left["magnitude"] < left["none"]
    assert left["none"] < float((x @ errors.T).square().sum())


@pytest.mark.parametrize("weighting", SHARES)
def test_full_rank_leaves_nothing(weighting):
    x, errors = case()
    assert corrected(x, errors, 9, weighting) < 1e-16 * float((x @ errors.T).square().sum())


@pytest.mark.parametrize("weighting", SHARES)
def test_inputs_that_never_come_do_no_harm(weighting):
    x, errors = case()
    x[:, 3], x[:, 4] = 0, x[:, 5]
    left = corrected(x, errors, 4, weighting)
    assert left < float((x @ errors.T).square().sum())
    assert corrected(0 * x, errors, 4, weighting) == 0


def test_special_cases_by_hand():
    x, errors = case()
    magnitude = x.abs().mean(0)
    left, values, right = torch.linalg.svd(errors * magnitude, full_matrices=False)
    product = (left[:, :2] * values[:2]) @ right[:2] / magnitude
    wanted = float((x @ (errors - product).T).square().sum())
    assert corrected(x, errors, 2, "magnitude") == pytest.approx(wanted)
    left, values, right = torch.linalg.svd(errors, full_matrices=False)
    product = (left[:, :2] * values[:2]) @ right[:2]
    wanted = float((x @ (errors - product).T).square().sum())
    assert corrected(x, errors, 2, "none") == pytest.approx(wanted)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5, bias=False)).eval()


def quantized(x: Tensor, *methods: object, **options: object) -> nn.Module:
    options = {"coverage": "weight_only", "weight_bits": 3, "weights": 8, **options}
    return qt.quantize(small(), data=x.split(50), methods=methods, **options)


def test_a_model_of_full_rank_is_the_float_one_and_of_less_it_is_nearer():
    x = torch.randn(200, 16)
    exact = small()(x)
    torch.testing.assert_close(quantized(x, QERA(rank=16))(x), exact, rtol=1e-4, atol=1e-5)
    off = [(model(x) - exact).norm() for model in (quantized(x, QERA(rank=4)), quantized(x))]
    assert off[0] < 0.8 * off[1]


@pytest.mark.parametrize("coverage", ["linear", "full"])
def test_the_added_product_is_of_rounded_inputs_and_before_outputs_are_rounded(coverage):
    x = torch.randn(200, 16)
    model = quantized(x, QERA(rank=2), coverage=coverage)
    layer = model[0]
    seen = layer.input_quantizer(x)
    sums = layer.correction.up @ layer.correction.down + layer.weight
    expected = layer.output_quantizer(seen @ sums.T + layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    weight = layer.weight_quantizer(layer.weight)
    assert torch.equal(weight, layer.weight)


def test_saved_loaded_copied_and_told(tmp_path):
    x = torch.randn(200, 16)
    model = quantized(x, QERA(rank=2))
    qt.save(model, tmp_path / "model.safetensors")
    loaded = qt.load(small(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert describe(model)["corrections"] == {"0": 2, "2": 2}
    assert "corrections" not in describe(quantized(x))
    told = qt.summary(model)
    assert told.integer_parameters < qt.summary(quantized(x)).integer_parameters
    assert [one.reason for one in told.floats if "correction" in one.name][:1] == [
        "a method adds it in float"
    ]


@pytest.mark.parametrize("weights", [8, "channel"])
@pytest.mark.parametrize("name", MODELS)
def test_loaded_models_compute_the_same_bits_where_nothing_is_rounded_behind(
    name, weights, tmp_path
):
    example = shallow(name)
    fresh = copy.deepcopy(example.model)
    options = {"coverage": "weight_only", "weight_bits": 4, "weights": weights}
    if name == "swin":
        options["overrides"] = {"layers*": None}  # of 12 channels
    model = qt.quantize(example.model, methods=["qera"], data=[example.inputs], **options)
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(fresh, tmp_path / "model.safetensors")
    for found, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert found.stride() == wanted.stride()
    assert torch.equal(example.logits(again), example.logits())


def test_half_precision_holds_what_is_added():
    x = torch.randn(200, 16)
    x[:, 3] = 1e-6  # of which the inverse of its moments is large
    model = quantized(x, QERA(rank=16))
    exact = model(x).detach()
    for one in (model[0].correction, model[2].correction):
        assert max(p.abs().max().item() for p in one.parameters()) < 100
    assert (model.half()(x.half()).float() - exact).norm() < 0.02 * exact.norm()


def test_other_descriptions_and_exports_are_refused(tmp_path):
    from contextlib import ExitStack

    x = torch.randn(200, 16)
    model = quantized(x, "qera", weights="channel")
    with pytest.raises(ValueError, match=r"0 adds a product of floats to its own \(qera\)"):
        qt.export_onnx(model, x, tmp_path / "model.onnx")
    good = describe(model)
    for bad, message in (
        ({"0": 0}, "corrections.0 must be a rank from 1, got 0"),
        ({"1": 2}, "corrections: '1' is no quantized Linear"),
        ({"0": 10**12}, "corrections: '0' has rank .* at most, got 1000000000000"),
        ([2], "corrections must be an object"),
    ):
        with ExitStack() as undo, pytest.raises(ValueError, match=message):
            from_description(small(), good | {"corrections": bad}, undo)


def test_options_are_checked_and_an_error_leaves_no_correction():
    with pytest.raises(ValueError, match="weighting must be one of exact, diagonal"):
        QERA(weighting="plain")
    with pytest.raises(ValueError, match="rank must be a whole number from 1, got 0"):
        QERA(rank=0)
    model = small()
    options = {"coverage": "weight_only", "overrides": {"*": None}}
    with pytest.raises(ValueError, match="was reached"):
        qt.quantize(model, data=[torch.randn(3, 16)], methods=["qera"], **options)
    assert type(model[0]) is nn.Linear
