"""Grids that are not uniform: PTQ4ViT's two ranges, FQ-ViT's shifts and logarithms."""

import copy

import pytest
import torch
from models import bert, shallow
from torch import nn

import quanttune as qt
from quanttune.quantization.methods import FQViT, PTQ4ViT
from quanttune.quantization.other_grid import OtherGrid, put
from quanttune.quantization.quantizer import ActivationQuantizer
from quanttune.quantization.requantization import requantize
from quanttune.quantization.saving.description import describe
from quanttune.quantization.state import quantizers
from quanttune.quantization.value_grids import LogQuantizer, TwinQuantizer

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def calibrated(kind: str, absmax: float, bits: int) -> ActivationQuantizer:
    found = ActivationQuantizer(bits, kind, None, CPU)
    found.absmax, found.calibrated = torch.tensor(absmax), True
    found.dynamic = False
    found.set_bits(bits)
    return found


def of_softmax(bits: int, m: int) -> TwinQuantizer:
    steps = 2 ** (bits - 1)
    grid = calibrated("probability", 1.0, bits)
    return TwinQuantizer.after(grid).of(1 / steps, 2.0**-m / steps, 2.0**-m)


# ------------------------------------------------------------------ twin ranges


def test_twin_ranges_of_a_softmax_by_hand():
    twin = of_softmax(4, 3)  # Q = 8: steps of 1/64 below 1/8, of 1/8 from there on
    x = torch.tensor([0, 0.2 / 64, 0.6 / 64, 6.9 / 64, 7.6 / 64, 1 / 8, 0.18, 0.2, 0.5, 0.95, 1.0])
    expected = torch.tensor([0, 0, 1 / 64, 7 / 64, 7 / 64, 1 / 8, 1 / 8, 2 / 8, 0.5, 7 / 8, 7 / 8])
    assert torch.equal(twin.round(x), expected)
    # no part is added twice: 0.5 stays 0.5, where the official code gives 0.629
    assert torch.equal(twin.round(twin.round(x)), twin.round(x))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_without_a_split_it_is_one_range_of_one_bit_less(bits):
    x = torch.rand(1000)
    steps = 2 ** (bits - 1)
    one_range = (x * steps).round().clamp(0, steps - 1) / steps
    assert torch.equal(of_softmax(bits, 0).round(x), one_range)


def test_some_split_beats_signed_steps_on_a_softmax():
    p = (3 * torch.randn(200, 64)).softmax(-1)

    def error(rounded):
        return (rounded - p).square().mean().item()

    plain = error(calibrated("probability", p.max().item(), 6).round(p))
    assert min(error(of_softmax(6, m).round(p)) for m in range(10)) < plain / 4


def test_a_gelu_keeps_its_minimum():
    x = torch.linspace(-6, 6, 4001)
    y = nn.functional.gelu(x)
    low = y.min().item()
    twin = TwinQuantizer.after(calibrated("input", y.max().item(), 6))
    twin.of(y.max() / 31, -low / 32, 0.0)
    assert low == pytest.approx(-0.16997124, abs=1e-6)
    assert twin.round(y).min().item() == pytest.approx(low, rel=1e-6)
    assert twin.round(y).max().item() == pytest.approx(6, rel=1e-6)
    fine = (twin.round(y) - y)[y < 0].abs().max()
    assert fine <= -low / 64 * 1.001
    codes = twin.round(y).unique()
    assert len(codes) <= 2**6


def test_ptq4vit_splits_what_softmax_and_gelu_return():
    method = PTQ4ViT(metric="mse")  # of eight images a gradient tells less
    model = qt.quantize(shallow("vit").model, 6, coverage="linear", methods=[method], data=[IMAGES])
    twins = {name for name, q in quantizers(model).items() if q.grid == "twin"}
    assert twins == {
        "blocks.0.attn.attention0_probability_quantizer", "blocks.0.mlp.fc2.input_quantizer",
    }  # fmt: skip
    split = model.blocks[0].attn.attention0_probability_quantizer
    assert split.scale == 1 / 32
    assert (split.scale / split.fine).log2().item() == -split.split.log2().item()
    rows = {site.name: site for site in qt.summary(model).sites}
    assert {rows[name].grid for name in twins} == {"twin"}
    assert " grid" in str(qt.summary(model)).splitlines()[1]
    plain = qt.quantize(shallow("vit").model, 6, coverage="linear", methods=[PTQ4ViT(twin=False)],
                        data=[IMAGES])  # fmt: skip
    assert not any(isinstance(q, OtherGrid) for q in quantizers(plain).values())
    assert " grid" not in str(qt.summary(plain)).splitlines()[1]


# ------------------------------------------------------------------ logarithms


def test_logarithms_by_hand():
    grid = LogQuantizer.after(calibrated("probability", 1.0, 4))
    p = torch.tensor([1, 0.5, 0.3, 0.36, 2.0**-15, 2.0**-16, 0.0])
    expected = torch.tensor([1, 0.5, 0.25, 0.5, 2.0**-15, 0.0, 0.0])
    assert torch.equal(grid.round(p), expected)
    assert torch.equal(LogQuantizer.after(calibrated("probability", 1.0, 8)).round(p)[:-1],
                       torch.tensor([1, 0.5, 0.25, 0.5, 2.0**-15, 2.0**-16]))  # fmt: skip


def test_gradients_go_straight_through_logarithms():
    p = torch.rand(50, requires_grad=True)
    weights = torch.randn(50)
    (LogQuantizer.after(calibrated("probability", 1.0, 4)).round(p) * weights).sum().backward()
    assert torch.equal(p.grad, weights)


# ------------------------------------------------------------------ shifts of channels


class Sums(nn.Module):
    """What goes into a LayerNorm, with a Linear behind it."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, 3)

    def forward(self, x):
        return self.head(self.norm(x))


def test_channels_of_small_ranges_take_small_steps():
    x = 2 * torch.rand(500, 4) - 1
    x[0] = 1.0
    x[:, 1] /= 8
    model = qt.quantize(Sums(), 8, methods=["fq_vit"], data=list(x.split(100)))
    grid = model.norm.input_quantizer
    assert grid.exponents.tolist() == [3, 0, 3, 3]
    assert grid.scale.item() == pytest.approx(1 / 127 / 8, rel=1e-6)


def test_exponents_are_those_of_a_search_by_hand_and_codes_are_integers_of_one_scale():
    x = torch.randn(300, 16) * torch.logspace(-2, 0, 16)
    model = qt.quantize(Sums(16), 6, methods=["fq_vit"], data=list(x.split(100)))
    grid = model.norm.input_quantizer
    top = x.abs().max().double() / 31
    errors = []
    for k in range(4):
        step = top / 8 * 2**k
        errors.append(((x / step).round().clamp(-32, 31) * step - x).square().sum(0))
    assert grid.exponents.tolist() == torch.stack(errors).argmin(0).tolist()
    assert len(grid.exponents.unique()) > 2
    plain = calibrated("residual", x.abs().max().item(), 6)
    assert ((grid.round(x) - x).square().sum(0) <= (plain.round(x) - x).square().sum(0)).all()
    codes = grid.round(x) / grid.scale
    torch.testing.assert_close(codes, codes.round(), rtol=1e-5, atol=1e-3)
    assert codes.abs().max() <= 32 * 8


def test_fq_vit_rounds_every_sum_of_a_vit():
    model = qt.quantize(shallow("vit").model, 6, coverage="full", data=[IMAGES],
                        methods=[FQViT(log_softmax=True)])  # fmt: skip
    grids = {name: q.grid for name, q in quantizers(model).items() if q.grid != "uniform"}
    assert grids == {
        "blocks.0.norm1.input_quantizer": "channel_shift",
        "blocks.0.norm2.input_quantizer": "channel_shift",
        "blocks.0.add0_quantizer": "channel_shift",
        "blocks.0.add1_quantizer": "channel_shift",
        "norm.input_quantizer": "channel_shift",
        "blocks.0.attn.attention0_probability_quantizer": "log2",
    }
    add, norm = model.blocks[0].add0_quantizer, model.blocks[0].norm2.input_quantizer
    assert torch.equal(add.exponents, norm.exponents)  # one tensor: it is rounded once


# ------------------------------------------------------------------ saved, exported, refused


def test_what_is_trained_on_is_what_is_measured():
    """With gradients a Linear has a way of its own to round its input; it is for uniform grids."""
    model, rows = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(16, 8)
    qt.quantize(model, 4, coverage="full", data=[rows])
    site = quantizers(model)["2.input_quantizer"]
    put(model, "2.input_quantizer", TwinQuantizer.after(site).of(site.scale, 0.17 / 8, 0.0))
    with torch.no_grad():
        measured = model(rows)
    with torch.enable_grad():
        torch.testing.assert_close(model(rows), measured, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("methods", [[FQViT(log_softmax=True)], ["fq_vit", "ptq4vit"]])
def test_grids_are_saved_and_loaded(name, methods, tmp_path):
    example = shallow(name)
    untouched = copy.deepcopy(example.model)
    model = qt.quantize(example.model, 6, coverage="full", methods=methods, data=[example.inputs])
    qt.save(model, tmp_path / "model.safetensors")
    again = qt.load(untouched, tmp_path / "model.safetensors").eval()
    assert torch.equal(example.logits(again), example.logits(model))
    assert describe(again) == describe(model)
    assert "grid_groups" in describe(model)


def test_a_model_of_transformers_keeps_its_grids(tmp_path):
    import quanttune.quantization.pretrained  # noqa: F401

    example = bert()
    model = qt.quantize(example.model.eval(), 6, methods=["fq_vit"], data=[example.inputs])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(example.logits(again), example.logits(model))


def broken(change):
    """Return the error of a description that is changed."""
    model = qt.quantize(Sums(), 8, methods=["fq_vit"], data=[torch.randn(9, 4)])
    from contextlib import ExitStack

    from quanttune.quantization.saving.description import from_description

    data = describe(model)
    change(data["grid_groups"]["group_0"])
    with pytest.raises(ValueError, match="grid_groups") as error, ExitStack() as undo:
        from_description(Sums(), data, undo)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": "log3"}, "must be of twin, log2, channel_shift, .*, got 'log3'"),
        ({"channels": 0}, "must be a whole number of channels, got 0"),
        ({"channels": 2**40}, "must be a whole number of channels"),
        ({"targets": ["nothing"]}, "the model does not round 'nothing'"),
        ({"more": 1}, r"has unknown field\(s\) more"),
    ],
)
def test_descriptions_are_checked(change, message):
    import re

    assert re.search(message, broken(lambda group: group.update(change)))


def test_exponents_of_a_file_are_checked():
    model = qt.quantize(Sums(), 8, methods=["fq_vit"], data=[torch.randn(9, 4)])
    grid = model.norm.input_quantizer
    grid.exponents[2] = 9
    with pytest.raises(ValueError, match=r"norm\.exponents must be from 0 to 3, got"):
        grid.check_loaded("norm")
    twin = of_softmax(4, 3)
    twin.split = torch.tensor(torch.nan)
    with pytest.raises(ValueError, match=r"p\.split must be from 0 to 1, got nan"):
        twin.check_loaded("p")


REFUSALS = {
    "onnx": lambda model, path: qt.export_onnx(model, IMAGES, path),
    "torch": lambda model, path: qt.export_torch(model, IMAGES),
    "lsq": lambda model, path: qt.learn_scales(model),
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["fq_vit"], "fq_vit rounds blocks.0.norm1.input_quantizer to a channel_shift grid"),
        (["ptq4vit"], "ptq4vit rounds .* to a twin grid, which needs codes of two ranges"),
        (["peg"], "peg rounds .* to a channel_groups grid, which needs a scale for each group"),
        (["llm_int8"], "llm_int8 rounds .* to a outlier_columns grid, which needs columns in"),
    ],
)
def test_what_takes_uniform_grids_only_refuses_others_by_name(what, methods, message, tmp_path):
    model = qt.quantize(shallow("vit").model, 6, methods=methods, data=[IMAGES])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"{message}.*Quantize the float model without"):
        REFUSALS[what](model, tmp_path / "model.onnx")
    assert before.keys() == model.state_dict().keys()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["ptq4vit", "peg", "llm_int8"])
def test_models_with_other_grids_are_compiled_in_one_graph(method):
    example = shallow("vit")
    model = qt.quantize(example.model, coverage="linear", methods=[method], data=[IMAGES])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


def test_other_widths_are_refused():
    model = qt.quantize(Sums(), 8, methods=["fq_vit"], data=[torch.randn(9, 4)])
    with pytest.raises(ValueError, match=r"fq_vit chose the grid of norm\.input_\w+ for 8"):
        requantize(model, 6, "channel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": False}, "fq_vit is for what goes into LayerNorms, none of which is rounded"),
        ({"coverage": "linear"}, "fq_vit is for what goes into LayerNorms"),
        ({"symmetric": False}, "fq_vit needs constant symmetric grids"),
        ({"calibrator": "dynamic"}, "fq_vit needs constant symmetric grids"),
        ({"methods": [FQViT(log_softmax=True)]}, "what softmax returns, which is not rounded"),
        ({"methods": ["ptq4vit"], "symmetric": False}, "twin ranges have no zero points"),
        ({"methods": ["ptq4vit", "fq_vit"]}, "comes before what rounds it: fq_vit, ptq4vit"),
    ],
)
def test_where_methods_do_not_apply(options, message):
    with pytest.raises(ValueError, match=message):
        qt.quantize(shallow("vit").model, 8, **{"methods": ["fq_vit"], "data": [IMAGES], **options})
